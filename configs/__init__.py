"""Presets: recipes for `train --config`, shipped with the package."""
