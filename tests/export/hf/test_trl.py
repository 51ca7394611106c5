"""TRL's trainers on an exported folder, unchanged: three steps of each, with their defaults."""

import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("trl", reason="trl is not installed")

from dualroute.export.hf import folder as huggingface  # noqa: E402
from tests.conftest import WORDS  # noqa: E402

pytestmark = pytest.mark.slow
TEXTS = [" ".join(WORDS[first : first + 3 + first % 5]) for first in range(12)]


@pytest.fixture
def exported(loaded, tmp_path):
    """A folder, its tokenizer, and options that every trainer here is given."""
    (tmp_path / "hf").mkdir()
    huggingface.write(loaded(), tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    options = {
        "output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "model_init_kwargs": {"trust_remote_code": True},
    }  # fmt: skip
    return str(tmp_path / "hf"), tokenizer, options


def trained(trainer):
    """Losses of the steps; the weights have changed."""
    before = [value.detach().clone() for value in trainer.model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    after = list(trainer.model.parameters())
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    return losses


def test_supervised_fine_tuning(exported):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder, tokenizer, options = exported

    def losses(**more):
        data = Dataset.from_dict({"text": TEXTS})
        arguments = SFTConfig(**options, **more)
        return trained(
            SFTTrainer(model=folder, args=arguments, train_dataset=data, processing_class=tokenizer)
        )

    plain = losses()
    assert losses(padding_free=True, max_length=None) == pytest.approx(plain, abs=1e-4)
    losses(packing=True, max_length=24)


def test_texts_packed_for_training_do_not_see_each_other(exported):
    """The batch that TRL makes of packed texts has the loss of the texts one by one."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder, tokenizer, options = exported
    trainer = SFTTrainer(
        model=folder, args=SFTConfig(**{**options, "packing": True, "max_length": 40}),
        train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    positions, ids = batch["position_ids"], batch["input_ids"]
    model = trainer.model.eval()
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        starts = (positions[0] == 0).nonzero()[:, 0].tolist()
        assert len(starts) > 2
        for begin, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            alone = model(input_ids=ids[:, begin:end]).logits
            torch.testing.assert_close(packed[:, begin:end], alone, rtol=0, atol=1e-4)


def test_preferences(exported):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    folder, tokenizer, options = exported
    data = Dataset.from_dict(
        {"prompt": TEXTS[:6], "chosen": [" river"] * 6, "rejected": [" house sees the"] * 6}
    )
    losses = trained(
        DPOTrainer(model=folder, args=DPOConfig(**options), train_dataset=data, processing_class=tokenizer)
    )
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # both models are one: log 2


def test_a_rule_as_reward(exported):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    folder, tokenizer, options = exported
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [float(text.count("e")) for text in completions]

    arguments = GRPOConfig(**options, num_generations=2, max_completion_length=8)
    trained(
        GRPOTrainer(
            model=folder, reward_funcs=reward, args=arguments, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": TEXTS[:8]}),
        )
    )  # fmt: skip
    assert len(seen) >= 6
