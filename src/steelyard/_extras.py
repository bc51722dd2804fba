"""Optional dependencies: which extra brings what, and one line for a missing one."""

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Extra:
    """An extra of the package: the modules it installs and what they make possible."""

    modules: tuple[str, ...]
    gives: str

    def missing(self) -> list[str]:
        """Return the modules that are not installed, without importing any."""
        return [name for name in self.modules if importlib.util.find_spec(name) is None]


EXTRAS: dict[str, Extra] = {
    "rl": Extra(
        ("gymnasium", "mujoco", "ale_py", "cv2", "stable_baselines3"),
        "reinforcement learning on MuJoCo and Atari, the recipe bpo, the stable-baselines3 adapter",
    ),
    "lm": Extra(
        ("transformers", "accelerate", "gguf"),
        "Hugging Face language models: token analysis, masked-diffusion sampling, the tiny model "
        "of the lab, SmolLM2 from its package",
    ),
    "reasoning": Extra(("reasoning_gym",), "tasks of reasoning-gym with their verifiers"),
    "trl": Extra(
        ("trl", "accelerate", "peft", "datasets"),
        "our objectives in TRL's trainers of language models, with LoRA and on several processes",
    ),
    "verl": Extra(("verl",), "our objectives in verl, by name"),
    "federated": Extra(
        ("flwr", "ray"), "the Flower strategy FedAU, with simulated clients in Ray processes"
    ),
    "sweep": Extra(("ray",), "sweeps of seeds and recipes on Ray, on a machine or a cluster"),
    "tabular": Extra(
        ("sklearn", "xgboost", "duckdb", "safetensors"),
        "estimators in the manner of scikit-learn, stump bins, tables larger than memory",
    ),
    "metrics": Extra(("torchmetrics",), "metrics as torchmetrics objects, for use in trainers"),
}


def install_line(extra: str) -> str:
    """Return the command that installs an extra."""
    return f"pip install 'steelyard[{extra}]'"


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module, or say in one line how to get it.

    Args:
        module: dotted name, for example ``"gymnasium.vector"``.
        extra: the extra of this package that installs it.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.

    Example:
        >>> require("a_package_nobody_has", extra="rl")
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: steelyard needs a_package_nobody_has for this: \
pip install 'steelyard[rl]'
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        reason = f"steelyard needs {package} for this: {install_line(extra)}"
        raise ModuleNotFoundError(reason, name=package) from None
