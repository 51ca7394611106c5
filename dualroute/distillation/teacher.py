"""The teacher: a frozen model that stands beside the training and is no part of it.

In: the path of a checkpoint.  Here: it is checked against the data and the student, loaded, and wrapped in
:class:`Teacher`, which runs it without gradients in a dtype of its own.  Next: its hidden states go to
:mod:`~dualroute.distillation.losses` and, layer by layer, to
:mod:`~dualroute.distillation.intermediate`.

Any module will do that has ``hidden_states(input_ids, *, segment_ids, positions)`` → (B, n, D) and
``head.weight`` (V, D); only what looks inside (layers, heads) asks for more.

:class:`Teacher` is not an ``nn.Module``.  As an attribute of the LightningModule it is
therefore seen by nobody who walks over modules: it is in no checkpoint, no optimizer, no bucket of DDP, and
ZeRO-3 does not cut it up.  Where it is to be cut up it does that itself, with FSDP2, whatever trains the
student.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from dualroute.attention.core.layout import LayoutPlan
from dualroute.data.tokenizer import Tokenizer
from dualroute.errors import UserError
from dualroute.files import file_sha256
from dualroute.model import DualRoutingTransformer
from dualroute.model.checkpoint.format import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    check_weights,
    find_checkpoint,
    load_model,
    open_weights,
    refuse_quantized,
    replace_parameter,
    verify_checkpoint,
)
from dualroute.model.checkpoint.weights_file import TensorFile
from dualroute.model.config import ModelConfig
from dualroute.model.foreign.hub import is_foreign, load_causal_lm
from dualroute.training.parallel.environment import detect_world
from dualroute.training.prepare import check_same_tokenizer
from dualroute.training.step.allocator import give_back_freed_memory


class Teacher:
    """A model that is only asked.

    Args:
        model: See the module's docstring; it is frozen and put into evaluation mode.
        dtype: Of its weights and arithmetic, whatever the student's.
        offload: Keep its layers in the memory of the host, and bring one at a time to the device.
        sharded: Divide its layers among the ranks of the run (see :meth:`shard`); one process keeps them.
        digest: sha256 of its weights, for caches of what it says.
        weights: Of layers that are on the meta device; :meth:`shard` reads each rank's part of them.

    Raises:
        UserError: ``offload`` or ``sharded`` of a model without ``layers``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: str = "float32",
        offload: bool = False,
        sharded: bool = False,
        digest: str = "",
        weights: TensorFile | None = None,
    ) -> None:
        if offload and not hasattr(model, "layers"):
            raise UserError("distill.teacher_offload moves layers, and this teacher has no list of them")
        if sharded and not hasattr(model, "layers"):
            raise UserError("distill.teacher_sharded divides layers, and this teacher has no list of them")
        frozen: Any = model.eval().requires_grad_(False).to(getattr(torch, dtype))
        self.model = frozen
        self.digest = digest
        self.weights = weights
        self.offload = offload
        self.sharded = sharded and detect_world().world_size > 1
        self._is_divided = False
        #: of a batch, the layout that the loader has made for this model; null: it makes its own
        self.layout_key: str | None = None
        if offload and not self.sharded:
            for layer in self.model.layers:
                _visit_device(layer, self)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.weight.device

    @property
    def weight(self) -> Tensor:
        """Its output weight (V, D_t)."""
        weight: Tensor = self.model.head.weight
        return weight

    @property
    def width(self) -> int:
        """D_t."""
        return int(self.weight.shape[1])

    def to(self, device: torch.device) -> None:
        """Move it; with ``offload`` or ``sharded`` all but its layers."""
        if self.device == device:
            return
        layers = set(self.model.layers.modules()) if self.offload or self.sharded else set()
        for module in self.model.modules():
            if module not in layers:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(device)
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = buffer.to(device)

    def shard(self) -> None:
        """Leave 1/N of each parameter of its layers on each of N ranks; does nothing unless ``sharded``.

        To be called after :meth:`to`, once the process group of all ranks is there; a second call does
        nothing.  Layers are cut one by one, so a device never holds them all; those without weights get
        theirs now, each rank the rows that fall to it.  From then on :meth:`hidden_states` is collective:
        every rank calls it equally often, on batches of any shape.  A layer is gathered for its own forward
        pass and freed after it; embedding, last norm and head stay whole, since losses read :attr:`weight`.
        With ``offload`` the pieces lie in the memory of the host.
        """
        if not self.sharded or self._is_divided:
            return
        device = self.device.type
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
        home = CPUOffloadPolicy(pin_memory=device == "cuda") if self.offload else OffloadPolicy()
        whole = set(self.model.parameters()) - set(self.model.layers.parameters())
        for number, layer in enumerate(self.model.layers):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, offload_policy=home)
            if self.weights is not None:
                layer.to_empty(device="cpu" if self.offload else self.device)
                _fill_pieces(layer, self.weights, f"layers.{number}.")
        # the root divides nothing, but through it the layers share streams, and so the memory they gather in
        fully_shard(self.model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        register_fsdp_forward_method(self.model, "hidden_states")
        if device == "cpu":  # or the holes that gathered layers leave behind outgrow what is saved
            give_back_freed_memory()
        self._is_divided = True

    def set_sequence_group(self, group: Any) -> None:
        """Divide texts among the ranks of ``group``, as the student does."""
        if group is not None:
            self.model.set_sequence_group(group)

    @torch.no_grad()
    def hidden_states(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, n, D_t) after its last norm; of this rank's tokens where ranks share texts."""
        with torch.autocast(self.device.type, enabled=False):
            known = {} if self.layout_key is None else {"layout": batch.get(self.layout_key)}
            hidden: Tensor = self.model.hidden_states(
                batch["input_ids"], segment_ids=batch["segment_ids"], positions=batch["positions"], **known
            )
        return hidden

    def layout_plans(self, plan: LayoutPlan | None = None) -> dict[str, LayoutPlan]:
        """What the loader has to lay out, by key in a batch, for a student with ``plan`` and this teacher.

        A teacher with blocks of the same size reads a batch in the student's layout, any other in
        ``teacher_layout``; a model of another library (GPT-2) asks for neither.
        """
        own = self.model.layout_plan() if isinstance(self.model, DualRoutingTransformer) else None
        if own is None:
            return {} if plan is None else {"layout": plan}
        if plan is None:
            self.layout_key = "layout"
            return {"layout": own}
        if own[2:] == plan[2:] and own.block == plan.block:
            self.layout_key = "layout"
            return {"layout": plan._replace(limits=tuple(sorted({*plan.limits, *own.limits})))}
        self.layout_key = "teacher_layout"
        return {"layout": plan, "teacher_layout": own}


def _fill_pieces(layer: nn.Module, weights: TensorFile, prefix: str) -> None:
    """Read this rank's rows of each parameter of a layer that is divided along its first axis."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    divided: Any
    for name, divided in layer.named_parameters():
        piece: Tensor = divided.to_local()
        first = min(rank * -(-divided.shape[0] // ranks), divided.shape[0])
        piece.copy_(weights.read(prefix + name, (first, first + piece.shape[0])))


def _visit_device(layer: nn.Module, teacher: Teacher) -> None:
    """Make ``layer`` come to the device for its forward pass, and leave only a reference behind."""
    home: dict[str, Tensor] = {}

    def come(module: nn.Module, *_: Any) -> None:
        for name, tensor in _tensors(module):
            home[name] = tensor.data
            tensor.data = tensor.data.to(teacher.device, non_blocking=True)

    def leave(module: nn.Module, *_: Any) -> None:
        for name, tensor in _tensors(module):
            tensor.data = home.pop(name)

    layer.register_forward_pre_hook(come)
    layer.register_forward_hook(leave, always_call=True)
    if torch.cuda.is_available():
        for _, tensor in _tensors(layer):
            tensor.data = tensor.data.pin_memory()


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def load_teacher(
    path: str,
    tokenizer: Tokenizer,
    data: str,
    context: int,
    *,
    dtype: str = "float32",
    offload: bool = False,
    sharded: bool = False,
) -> Teacher:
    """The teacher of a checkpoint, or one from elsewhere (see :mod:`dualroute.model.foreign.hub`).

    Args:
        path: Checkpoint or run folder, Hugging Face directory or llama2.c file.
        tokenizer: Of the data, which must be the teacher's.
        data: Where the data lie, for messages.
        context: Tokens of a window; the teacher must be able to read them.
        dtype: See :class:`Teacher`.
        offload: See :class:`Teacher`.
        sharded: See :class:`Teacher`.

    Raises:
        UserError: Nothing there, a damaged file, another tokenizer or vocabulary, or too short a range.
    """
    if is_foreign(path):
        return _foreign_teacher(path, tokenizer, data, context, dtype=dtype, offload=offload, sharded=sharded)
    checkpoint = find_checkpoint(path)
    refuse_quantized(checkpoint, "a teacher's head must be floats; give the checkpoint it was made from")
    check_same_tokenizer(checkpoint.folder / TOKENIZER, tokenizer, data)
    config = ModelConfig.from_file(checkpoint.folder / CONFIG)
    config.require_causal(f"the teacher {checkpoint.folder}")
    if config.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"the teacher {checkpoint.folder} has a vocabulary of {config.vocab_size} and the tokenizer of "
            f"{data} has {tokenizer.vocab_size} ids: what the one says cannot be compared over the other"
        )
    if config.max_context < context:
        raise UserError(
            f"the teacher {checkpoint.folder} reads at most {config.max_context} tokens (its max_context): "
            f"lower data.context {context}, or take another teacher"
        )
    digest, weights = weights_digest(checkpoint.folder), None
    if sharded and detect_world().world_size > 1:
        model, weights = open_divided(checkpoint)
    else:
        model = load_model(checkpoint)
    return Teacher(model, dtype=dtype, offload=offload, sharded=sharded, digest=digest, weights=weights)


def open_divided(checkpoint: Checkpoint) -> tuple[DualRoutingTransformer, TensorFile]:
    """The model of a checkpoint whose layers have no weights yet, and the file that they are in.

    Rank 0 alone compares the file with its sha256: the others read no more of it than they keep.

    Raises:
        UserError: The weights are missing, damaged or of another shape than ``model.json``.
    """
    verify_checkpoint(checkpoint, only=CONFIG)
    file = open_weights(checkpoint, verified=detect_world().rank == 0)
    with torch.device("meta"):
        model = DualRoutingTransformer(ModelConfig.from_file(checkpoint.folder / CONFIG))
    check_weights(model, file.shapes, str(file.path))
    for name in file.layout:
        if not name.startswith("layers."):
            replace_parameter(model, name, nn.Parameter(file.read(name)))
    return model, file


def _foreign_teacher(
    path: str,
    tokenizer: Tokenizer,
    data: str,
    context: int,
    *,
    dtype: str,
    offload: bool,
    sharded: bool,
) -> Teacher:
    """As :func:`load_teacher`."""
    model: Any
    model, file = load_causal_lm(path, getattr(torch, dtype))
    if file is None:
        raise UserError(
            f"the teacher {path} has no tokenizer beside it: make a checkpoint of both (dualroute convert "
            f"--attention dense --tokenizer FILE) and give that"
        )
    check_same_tokenizer(file, tokenizer, data)
    for name, wanted in (("offload", offload), ("sharded", sharded)):
        if wanted and not isinstance(model, DualRoutingTransformer):
            raise UserError(f"distill.teacher_{name} cannot be used with {path}, which another library runs")
    longest = model.config.max_context
    if longest < context:
        raise UserError(f"the teacher {path} reads at most {longest} tokens: lower data.context {context}")
    rows = model.head.weight.shape[0]
    if rows > tokenizer.vocab_size:  # rows that pad the vocabulary: no text has their ids
        model.head.weight = nn.Parameter(model.head.weight.detach()[: tokenizer.vocab_size].clone())
    return Teacher(model, dtype=dtype, offload=offload, sharded=sharded, digest=weights_digest(path))


def weights_digest(path: str | Path) -> str:
    """sha256 of the weights of a checkpoint, from its metadata; that of their files for any other model."""
    if is_foreign(path):
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
        return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
    return str(find_checkpoint(path).metadata["files"][WEIGHTS]["sha256"])
