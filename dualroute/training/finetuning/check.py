"""What can be wrong with the section ``finetune`` beside the rest of a configuration.

In: a configuration whose model is known.  Next: ``training/run.py`` starts the run; ``initial_model.py``
gives the model its adapters and freezes what is to stay.
"""

from __future__ import annotations

import torch

from dualroute.errors import UserError
from dualroute.model import DualRoutingTransformer
from dualroute.training.config import PretrainConfig
from dualroute.training.finetuning.adapters import require_peft, targets
from dualroute.training.finetuning.freezing import freeze
from dualroute.training.parallel.deepspeed_config import asked_stage


def check_strategy(config: PretrainConfig) -> None:
    """Refuse a strategy that this run cannot follow.

    Raises:
        UserError: Naming the key and the remedy.
    """
    strategy = config.finetune
    if strategy.adapter == "none" and not strategy.freeze and not strategy.by_depth:
        return
    if strategy.adapter != "none":
        _check_adapters(config)
    if strategy.unfreeze_share and asked_stage(config.parallel) == 3:
        raise UserError(
            "finetune.unfreeze_share cannot be used with parallel.zero_stage 3: use stage 2, or 0 here"
        )
    if strategy.freeze and strategy.adapter == "none":
        with torch.device("meta"):
            freeze(DualRoutingTransformer(config.model), strategy.freeze)


def _check_adapters(config: PretrainConfig) -> None:
    strategy, train = config.finetune, config.train
    require_peft()
    if config.init_from is None:
        raise UserError(
            "finetune.adapter changes a trained model: give its checkpoint as init_from, or adapter none"
        )
    if config.optim.name == "muon":
        raise UserError(
            "optim.name muon steps the matrices of layers, and with finetune.adapter these stay as they are "
            "(adapters are too thin to be orthogonalised): give optim.name adamw"
        )
    if strategy.dropout and train.quantization_aware is not None:
        raise UserError(
            f"finetune.dropout {strategy.dropout} leaves out inputs of the adapters alone, and "
            f"train.quantization_aware rounds each weight with its adapter added, which has one input: give "
            f"finetune.dropout 0"
        )
    with torch.device("meta"):
        targets(DualRoutingTransformer(config.model), strategy.targets)
