"""A trainer of transformers for objectives of whole models, the base of those that TRL has not."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from accelerate.utils import is_peft_model
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from steelyard.integrations.trl._backbone import check_no_virtual_tokens, check_plain_head, freeze
from steelyard.integrations.trl._sequences import check_tokenizer


class ObjectiveTrainer(transformers.Trainer):
    """``transformers.Trainer`` whose loss is :meth:`objective_loss` and which logs its parts.

    Args:
        model: the model to train, or the name or folder of one.
        args: settings of training.
        processing_class: its tokenizer; ``None`` = the one stored with the model.
        peft_config: of an adapter to add.
        **kwargs: those of ``transformers.Trainer``.

    Raises:
        ValueError: the head is not linear, the adapter adds tokens, or there is no end token.
    """

    model: Any
    processing_class: Any
    _signature_columns: Any

    loss_is_scaled_for_ga = False
    columns: tuple[str, ...] = ()
    """Of the data, that the collator takes."""

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        processing_class: Any = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        model = load(model)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(  # nosec B615  # the user's model
                model.config._name_or_path
            )
        check_tokenizer(processing_class)
        if peft_config is not None:
            if is_peft_model(model):
                raise ValueError("peft_config must be None for a model that has an adapter")
            model = get_peft_model(model, peft_config)
        check_plain_head("model", model)
        check_no_virtual_tokens(model)
        self._metrics: dict[str, dict[str, list[float]]] = {
            "train": defaultdict(list),
            "eval": defaultdict(list),
        }
        super().__init__(model=model, args=args, processing_class=processing_class, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "several GPUs must be used by a launcher (accelerate launch, torchrun), not by one "
                "process"
            )
        if is_peft_model(model) and self.args.gradient_checkpointing:
            model.enable_input_require_grads()
        # Trainer itself puts an old model into training mode in each step.
        self.model.train()

    def objective_loss(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the loss of a batch, 0-d."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a batch; micro-batches count alike."""
        loss = self.objective_loss(model, inputs)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """The loss, without anything else."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.objective_loss(model, inputs)
        return loss.detach(), None, None

    def note(self, name: str, value: Tensor) -> None:
        """Log a number, the mean over ranks and over the batches since the last log."""
        mode = "train" if self.model.training else "eval"
        gathered = self.accelerator.gather(value.detach().float())
        self._metrics[mode][name].append(gathered.mean().item())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The trainer's log, with what was noted."""
        mode, prefix = ("train", "") if self.model.training else ("eval", "eval_")
        for name, values in self._metrics[mode].items():
            logs[prefix + name] = sum(values) / len(values)
        self._metrics[mode].clear()
        super().log(logs, start_time)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self.columns)

    def place(self, model: Any) -> Any:
        """Freeze another model and bring it to the trainer's device."""
        return freeze(load(model)).to(self.accelerator.device)


def load(model: Any) -> Any:
    """A causal language model, by its name or folder if it is not there yet."""
    if not isinstance(model, str):
        return model
    return AutoModelForCausalLM.from_pretrained(model)  # nosec B615  # the user's choice


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout of a model to 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
