"""What bounds a request: the FLOPs and bytes of a model, over the measured rates of the machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spilld.demo.demo import Shape
from spilld.models.packed.packing import WEIGHTS
from spilld.offload.record import Element, Format


@dataclass(frozen=True)
class Work:
    """What a prompt of so many tokens and one more cannot be computed without."""

    linear_flops: float
    attention_flops: float
    weight_bytes: int
    record_bytes: int
    one_token_flops: float

    @classmethod
    def of(cls, folder: Path, tokens: int) -> Work:
        """From a model folder in bfloat16 whose input and output embeddings are one matrix."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        packed = folder / WEIGHTS
        embedding = config["vocab_size"] * config["hidden_size"]
        shape = Shape.of(folder)
        pair = 4 * shape.layers * config["num_attention_heads"] * shape.head_dim
        return cls(
            linear_flops=2.0 * tokens * (weights / Element.BFLOAT16.nbytes - embedding),
            attention_flops=pair * tokens**2 / 2,
            weight_bytes=packed.stat().st_size if packed.exists() else weights,
            record_bytes=shape.kv_bytes(tokens, Format.K8V4, Element.BFLOAT16),
            one_token_flops=float(pair * tokens),
        )

    def prefill_s(self, limits: Mapping[str, float]) -> float:
        linear = max(limits["bfloat16_flops"], limits["float32_flops"])
        return self.linear_flops / linear + self.attention_flops / limits["float32_flops"]

    def decode_ms(self, limits: Mapping[str, float]) -> float:
        records = max(
            self.record_bytes / limits["memory_bytes_s"], self.one_token_flops / limits["float32_flops"]
        )
        return 1e3 * (self.weight_bytes / limits["memory_bytes_s"] + records)
