"""What a model is worth: its answers while it is trained, its scores afterwards, and the search for a better recipe.

Rows and a model's answers become figures. Nothing here changes a training.
"""
