"""Whether a model fits this machine, from headers alone: what its weights and its KV take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spilld.config.config import Config
from spilld.config.named_models import sources_of
from spilld.errors import BudgetError
from spilld.models.files.folder import check_folder
from spilld.models.files.weights import WeightFiles, read_weight_files
from spilld.models.quantised.config import Scheme
from spilld.monitoring.memory import available_bytes
from spilld.offload.size import size

_NUMBER = {"float32": 4, "bfloat16": 2}
_PACKED = {"int8": 34 / 32, "int4": 20 / 32}
"""Bytes of a packed weight, with its share of scales."""

_OF_CODES = ("awq", "gptq", "compressed-tensors")
"""Methods whose own codes steps read."""


@dataclass(frozen=True)
class WeightsSize:
    """What a model's weights take, in bytes.

    Attributes:
        forms: By the settings that steps would read them with; about, for what is quantised already.
        form: Which of these the configuration asks for.
    """

    forms: dict[str, int]
    form: str

    @property
    def needed(self) -> int:
        """What the configuration asks for."""
        return self.forms[self.form]


def weights_size(config: Config) -> WeightsSize:
    """Return what the weights of the configured model take, from headers of its files.

    Raises:
        ModelError: There is no such model, or it cannot be served.
    """
    sources = sources_of(config.model)
    if not sources[0].is_dir():
        own = f'weights = "{config.weights}"'
        return WeightsSize({own: sum(source.stat().st_size for source in sources)}, own)
    scheme = check_folder(sources[0])
    files = read_weight_files(sources[0])
    count = files.parameters if scheme is None else _parameters(files, scheme)
    plain = f'weights = "bf16", dtype = "{config.dtype}"'
    forms = {plain: count * _NUMBER[config.dtype]}
    forms |= {f'weights = "{name}"': int(count * each) for name, each in _PACKED.items()}
    asked = plain if config.weights in ("auto", "bf16") else f'weights = "{config.weights}"'
    if scheme is not None and config.weights == "auto" and config.dtype == "bfloat16":
        asked = 'weights = "auto"'
        stored = sum(files.nbytes.values())
        forms[asked] = stored if scheme.method in _OF_CODES else int(count * _PACKED["int8"])
    return WeightsSize(forms, asked)


def _parameters(files: WeightFiles, scheme: Scheme) -> int:
    """Return how many weights quantised tensors stand for, about: their scales are counted, too."""
    each = {"float32": 1 / 4, "bfloat16": 1 / 2, "float16": 1 / 2, "I32": 8 / scheme.bits, "U8": 2.0}
    return int(sum(nbytes * each.get(dtype, 1.0) for dtype, nbytes in files.nbytes.items()))


def check_fits(config: Config, available: int | None) -> None:
    """Check that the weights fit memory, before anything is loaded.

    Args:
        config: The configuration. With device "cuda" only packed weights lie in host memory.
        available: Bytes that the machine and our control groups have left; None if the kernel does not say.

    Raises:
        BudgetError: They do not.
        ModelError: As `weights_size`.
    """
    if available is None or (config.device == "cuda" and config.weights in ("auto", "bf16")):
        return
    weights = weights_size(config)
    if weights.needed <= available:
        return
    fitting = [f"{form} takes {size(n)}" for form, n in weights.forms.items() if n <= available]
    raise BudgetError(
        f"{config.model} needs {size(weights.needed, least=True)} for its weights ({weights.form}), of "
        f"memory {size(available)} are available here: "
        + ("; ".join(fitting) if fitting else "no form of this model fits, take a smaller one")
    )


def report(config: Config) -> Iterator[tuple[str, str]]:
    """Yield what the configured model takes, and whether it fits; nothing is loaded.

    Raises:
        ModelError: As `weights_size`, or the model is of a kind that is not served.
    """
    available = available_bytes()
    weights = weights_size(config)
    for form, nbytes in weights.forms.items():
        fits = "" if available is None or nbytes <= available else ", more than is available"
        asked = ", as configured" if form == weights.form else ""
        yield "weights", f"{form}: {size(nbytes)}{fits}{asked}"
    if available is not None:
        yield "memory", f"{size(available)} are available"
    folder = sources_of(config.model)[0]
    if folder.is_dir():
        yield from _of_contexts(config, folder)


def _of_contexts(config: Config, folder: Path) -> Iterator[tuple[str, str]]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from spilld.kv.geometry import Geometry
    from spilld.models.families.text_part import text_config
    from spilld.models.files.folder import read_config
    from spilld.offload.record import BLOCK, SEALED, Element

    found = text_config(CONFIG_MAPPING[read_config(folder)["model_type"]].from_pretrained(folder))
    geometry, element = Geometry.of(found, found, None), Element(config.dtype)
    for form in SEALED:
        each = geometry.layouts(form, element).column_bytes // BLOCK
        longest = min((config.host_budget + config.disk_budget) // each, geometry.max_positions)
        asked = ", as configured" if form == config.format else ""
        yield "KV", f"{form}: {size(each)} a token, {longest} tokens within the budgets{asked}"
    if geometry.states:
        total = sum(sum(state.nbytes(element.nbytes)) for state in geometry.states)
        yield "state", f"{size(total)} a sequence, whatever its length"
