"""LoRA files, by the names of their tensors: low-rank updates ΔW = B A of another network's weights.

Source: Hu et al. 2021.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["REFUSAL", "is_lora"]

NAMES = re.compile(
    r"(?:^|\.)lora_(?:unet|te\d?|transformer)_|\.lora[._](?:up|down|A|B)\.|\.lora_linear_layer\.|_lora\.(?:up|down)\."
)
"""As kohya's scripts, PEFT and diffusers write them."""
BESIDE = (".alpha", ".dora_scale")
REFUSAL = (
    "it is a LoRA: low-rank updates of another network's weights, and no network. Open the pipeline that it was "
    "trained on with diffusers, call pipe.load_lora_weights(file), and load that: adapters.load(pipe), or a Scheduler "
    "inside it"
)


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA and nothing else."""
    told = [k for k in names if not k.endswith(BESIDE)]
    return bool(told) and all(NAMES.search(k) for k in told)
