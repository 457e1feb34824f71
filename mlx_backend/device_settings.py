"""What of MLX is set for the process while a model is loaded."""

from collections.abc import Callable

import mlx.core as mx

from common.recipe import Plan


def set_limits(plan: Plan) -> list[tuple[Callable[[int], int], int]]:
    """Set MLX's own limits by the plan's budget; returns `(setter, value before)` for each, to be restored."""
    if not plan.memory_budget:
        return []
    limit = min(plan.memory_budget, mx.get_memory_limit())  # MLX's own is below what the device has
    wanted = [(mx.set_memory_limit, limit), (mx.set_cache_limit, limit // 16)]
    if plan.device == "gpu" and mx.metal.is_available():
        recommended = int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
        wanted.append((mx.set_wired_limit, min(limit, recommended)))
    return [(set_limit, set_limit(value)) for set_limit, value in wanted]
