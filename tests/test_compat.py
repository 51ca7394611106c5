"""Each private name of a library, used once: a release that changes one fails here, and says what breaks."""

import inspect
import json
import pickle
from typing import ClassVar

import pytest
import torch

from dualroute import compat


def test_lightning_leaves_signals_alone():
    """Without: SIGTERM runs a collective on each rank at another moment, and the run hangs."""
    from lightning.pytorch import Trainer

    trainer = Trainer(logger=False, enable_checkpointing=False, barebones=True)
    assert callable(trainer._signal_connector.register_signal_handlers)
    compat.take_no_signals(trainer)
    assert trainer._signal_connector.register_signal_handlers() is None
    import signal

    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_flight_recorder_can_be_read(monkeypatch):
    """Without: a stall report cannot say which rank is missing from a collective."""
    from torch._C import _distributed_c10d

    assert isinstance(json.loads(_distributed_c10d._dump_fr_trace_json()), dict)
    assert all(not record.get("entries") for record in compat.flight_records())  # no group here
    assert isinstance(pickle.loads(compat.flight_dump()), dict)
    on_nccl = {"_dump_nccl_trace_json": b'{"entries": [1]}', "_dump_nccl_trace": b"nccl"}
    for name, dump in on_nccl.items():
        monkeypatch.setattr(_distributed_c10d, name, lambda dump=dump: dump, raising=False)
    assert compat.flight_records()[0] == {"entries": [1]}
    assert compat.flight_dump() == b"nccl"


def test_a_fused_optimizer_is_clipped_like_another():
    """Without: gradients cannot be clipped in bf16-mixed with a fused optimizer."""
    from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], fused=True)
    assert _optimizer_handles_unscaling(optimizer)
    compat.optimizer_leaves_scaling_to_others(optimizer)
    assert not _optimizer_handles_unscaling(optimizer)


def test_the_norm_of_zero3():
    """Without: no gradient norm, and no guard against bad steps, under ZeRO-3."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    assert callable(DeepSpeedZeroOptimizer_Stage3._get_norm_groups)

    class Optimizer:
        def _get_norm_groups(self):
            return [torch.tensor(3.0), torch.tensor(4.0)]

    assert float(compat.zero3_gradient_norm(Optimizer())) == pytest.approx(5.0)


def test_universal_checkpoints_are_read_in_parts():
    """Without: at a resume with other ranks each rank reads all of the state."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.tensor_fragment import tensor_fragment

    for name in ("load_hp_checkpoint_state", "_get_param_partition_group"):
        assert callable(getattr(DeepSpeedZeroOptimizer_Stage3, name))
    for kind in (DeepSpeedZeroOptimizer, BF16_Optimizer):
        assert not hasattr(kind, "load_hp_checkpoint_state")  # each parameter's own there
        assert callable(kind.update_lp_params)
    assert {"lp_fragment_address", "optim_fragment"} <= tensor_fragment.__dataclass_fields__.keys()

    class Whole:
        """A parameter of ten elements, which this rank has [4, 7) of."""

        class _hp_mapping:
            hp = torch.zeros(3)
            optim_fragment = None
            lp_fragment_address = type("Address", (), {"start": 4, "numel": 3})

            @classmethod
            def get_hp_fragment(cls):
                return cls.hp

    class State:
        step = torch.tensor(5.0)
        asked: ClassVar[list[tuple]] = []

        def keys_of(self, name):
            return ("fp32", "exp_avg", "exp_avg_sq")

        def read_range(self, name, key, start, count):
            self.asked.append((name, key, start, count))
            return torch.arange(start, start + count)

    parameter = Whole()
    parameter.load_hp_checkpoint_state = own = lambda: None
    optimizer = type("Optimizer", (), {"bit16_groups": [[parameter]]})()
    with compat.read_partitions_from(optimizer, State()):
        step = parameter.load_hp_checkpoint_state("…/zero/model.layers.0.weight", 0, 1, ep_rank=0, ep_size=1)
    assert step == 5
    assert parameter.load_hp_checkpoint_state is own
    assert State.asked == [("model.layers.0.weight", key, 4, 3) for key in ("fp32", "exp_avg", "exp_avg_sq")]
    assert Whole._hp_mapping.hp.tolist() == [4, 5, 6]
    assert set(parameter._hp_mapping.optim_fragment) == {"exp_avg", "exp_avg_sq"}


def test_what_lies_in_flat_parameters_is_known(monkeypatch):
    """Without: Muon cannot put matrices together that ZeRO has cut up."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module, names in {
        stage_1_and_2: ("round_robin_bit16_offsets", "round_robin_bit16_groups", "real_dp_process_group"),
        bf16_optimizer: ("fp32_groups_flat_partition", "bf16_groups", "real_dp_process_group"),
        stage3: ("fp32_partitioned_groups_flat", "sub_group_process_groups", "fp16_groups"),
    }.items():
        assert all(f"self.{name}" in inspect.getsource(module) for name in names)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    small, large = torch.zeros(4), torch.zeros(9)  # and 3 of padding, cut into two of 8
    flat = torch.zeros(8)

    def told(**attributes):
        ((parameter, group, inside),) = compat.divided_parameters(type("Optimizer", (), attributes)())
        assert parameter is flat
        assert group == "ranks"
        return inside

    shared = {"real_dp_process_group": ["ranks"]}
    of_zero = {"round_robin_bit16_offsets": [[0, 4]], "round_robin_bit16_groups": [[small, large]]}
    found = told(single_partition_of_fp32_groups=[flat], **of_zero, **shared)
    assert [entry[1:4] for entry in found if entry[3]] == [(4, 0, 5)]
    assert [(entry[3], entry[4]) for entry in found] == [(0, False), (5, True)]
    assert found == told(fp32_groups_flat_partition=[flat], bf16_groups=[[small, large]], **shared)
    for parameter, part in ((small, 2), (large, 5)):
        parameter.ds_numel, parameter.ds_tensor = parameter.numel(), type("Part", (), {"ds_numel": part})
    third = {"fp32_partitioned_groups_flat": [flat], "fp16_groups": [[small, large]]}
    found = told(**third, sub_group_process_groups=["ranks"])
    assert [entry[1:] for entry in found] == [(2, 0, 2, True), (5, 2, 4, True)]


def test_zero3_parameters_divide_others_like_themselves():
    """Without: under ZeRO-3 a model cannot get its weights already divided."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.partition_parameters import Init
    from lightning.pytorch.strategies import DeepSpeedStrategy

    assert "param.convert_to_zero_parameters = " in inspect.getsource(Init._convert_to_deepspeed_param)
    assert {"module", "config_dict_or_path"} <= inspect.signature(Init.__init__).parameters.keys()
    assert callable(DeepSpeedStrategy._init_config_if_needed)
    asked = []

    class First:
        convert_to_zero_parameters = staticmethod(asked.append)

    compat.zero3_partition("other", First, {})
    assert asked == [["other"]]


def test_the_groups_of_a_second_partition_are_made_once(monkeypatch):
    """Without: a teacher, or a training after a roll-back, cannot be divided under ZeRO++ hpZ."""
    pytest.importorskip("deepspeed")
    from deepspeed.utils import groups

    made = []
    monkeypatch.setattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None)

    def make(size):
        made.append(size)
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = "group"

    monkeypatch.setattr(groups, "_create_zero_param_parallel_group", make)
    for _ in range(2):
        compat.make_second_partition_once()
        groups._create_zero_param_parallel_group(4)
    assert made == [4]


def test_the_shared_memory_op_is_spared():
    """Without: the first start on a CPU compiles for 50 seconds."""
    pytest.importorskip("deepspeed")
    import deepspeed.ops

    compat.spare_shared_memory_op()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_the_compiler_has_what_decoding_sets():
    """Without: compiled decoding packs no weights, or computes shapes that it must not trust."""
    compile_fx, inductor, dynamo = compat.inductor()
    assert callable(compile_fx.compile_fx)
    assert callable(compile_fx.compile_fx_inner)
    for name in ("freezing", "max_autotune", "size_asserts", "autotune_num_choices_displayed"):
        assert hasattr(inductor, name)
    assert hasattr(dynamo, "cache_size_limit") or hasattr(dynamo, "recompile_limit")


def test_what_whole_layers_are_compiled_with(monkeypatch):
    """Without: a model of nine kinds of layers ends at the ninth, or each packing is compiled anew."""
    import torch._dynamo.config as dynamo

    for name in ("recompile_limit", "accumulated_recompile_limit", "optimize_ddp"):
        monkeypatch.setattr(dynamo, name, getattr(dynamo, name))  # what it was comes back
    compat.compile_regions()
    assert (dynamo.recompile_limit, dynamo.optimize_ddp) == (1024, False)
    torch._dynamo.reset()
    sizes = []

    def compiler(graph, inputs):
        sizes.append(inputs)
        return graph

    program = torch.compile(lambda rows: rows * 2, backend=compiler, fullgraph=True)
    for size in (5, 6, 7):
        rows = torch.ones(size)
        compat.size_varies(rows)
        program(rows)
    assert len(sizes) == 1


def test_an_operator_can_record_a_backward_pass():
    """Without: a compiled layer trains nothing but what lies after its attention."""
    rows = torch.ones(3, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert not (rows * 2).requires_grad
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            assert (rows * 2).requires_grad


def test_the_int4_product_of_a_cpu():
    """Without: int4 models read their weights as floats on a CPU, several times slower."""
    torch.manual_seed(0)
    values = torch.randint(0, 16, (32, 64), dtype=torch.int32)
    scales = torch.rand(2, 32) + 0.5
    rows = torch.randn(3, 64)
    steps = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    found = compat.int4_product_on_cpu(rows, compat.int4_packed_for_cpu(values), 32, steps)
    weight = (values - 8).float() * scales.t().repeat_interleave(32, dim=1)
    torch.testing.assert_close(found, rows @ weight.t(), rtol=1e-4, atol=1e-3)


def test_the_int8_product_of_a_gpu():
    """Without: int8_dynamic multiplies in float32 on a GPU.  On a CPU the same operator runs a slow loop."""
    rows = torch.randint(-128, 128, (17, 16), dtype=torch.int8)
    weight = torch.randint(-128, 128, (16, 8), dtype=torch.int8)
    assert torch.equal(compat.int8_product_on_cuda(rows, weight), rows.int() @ weight.int())


def test_fp16_of_a_processor_is_known_or_denied():
    """Without: 16-mixed on a CPU would be taken for supported, or refused where it is."""
    assert compat.fp16_on_cpu() in (True, False)
