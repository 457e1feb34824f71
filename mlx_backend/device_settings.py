"""What of MLX is set for the process while a model is loaded."""

import os
from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from common.recipe import Plan
from common.system.memory import total
from mlx_backend.devices import card_memory


def _set_limits(plan: Plan) -> list[tuple[Callable[[int], int], int]]:
    """Set MLX's own limits by the plan's budget; returns `(setter, value before)` for each, to be restored."""
    if not plan.memory_budget:
        return []
    limit = min(plan.memory_budget, mx.get_memory_limit())  # MLX's own is below what the device has
    wanted = [(mx.set_memory_limit, limit), (mx.set_cache_limit, limit // 16)]
    if plan.device == "gpu" and mx.metal.is_available():
        recommended = int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
        wanted.append((mx.set_wired_limit, min(limit, recommended)))
    return [(set_limit, set_limit(value)) for set_limit, value in wanted]


class DeviceSettings:
    """Set for a plan, until they are restored."""

    def __init__(self, plan: Plan) -> None:
        self._device = mx.default_device()
        mx.set_default_device(mx.gpu if plan.device == "gpu" else mx.cpu)
        self._turned_off = plan.device == "cpu" and "MLX_DISABLE_COMPILE" not in os.environ
        if self._turned_off:
            mx.disable_compile()  # on a CPU it calls a C++ compiler for every new shape
        card = card_memory(plan.device)
        self.memory: tuple[int, Literal["unified", "cuda"]] = (card, "cuda") if card else (total(), "unified")
        mx.reset_peak_memory()
        self._limits = _set_limits(plan)

    def restore(self) -> None:
        """What MLX keeps for the process becomes what it was before."""
        mx.clear_cache()
        for set_limit, before in self._limits:
            set_limit(before)
        if self._turned_off:
            mx.enable_compile()
        mx.set_default_device(self._device)
