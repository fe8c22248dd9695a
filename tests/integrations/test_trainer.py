"""Learned sparsity in Hugging Face's Trainer, on a tiny model and made-up sentences."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sat.integrations.trainer import STATE_FILE, SparsityCallback  # noqa: E402
from sat.integrations.transformers import LAYOUTS_FILE, load_layouts, prepare  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*:UserWarning", "ignore:.*no accelerator is found.*:UserWarning"
)


def small(config: Any, **options: Any) -> Any:
    return config(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        num_labels=3,
        pad_token_id=0,
        **options,
    )


def make_model() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(small(transformers.BertConfig, attn_implementation="sat"))


def make_samples(count: int = 48) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number in range(count):
        ids = torch.randint(1, 50, (24,), generator=generator)
        mask = torch.arange(24) < 24 - number % 9
        samples.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": number % 3})
    return samples


SETTINGS = {"density": 0.3, "block_size": 4, "interval": 2, "max_dense_steps": 6, "keep_first_tokens": 1}


def make_trainer(folder: Path, callback: SparsityCallback, steps: int = 12, **arguments: Any) -> Any:
    options = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 3,
        "save_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "seed": 7,
        **arguments,
    }
    return transformers.Trainer(
        make_model(),
        transformers.TrainingArguments(**options),
        train_dataset=make_samples(),
        eval_dataset=make_samples(8),
        callbacks=[callback],
    )


@pytest.mark.parametrize("mask", ["direct", "fisher"])
def test_trains_densely_then_sparsely(tmp_path, caplog, mask):
    callback = SparsityCallback(**SETTINGS, mask=mask)
    trainer = make_trainer(tmp_path, callback)
    with caplog.at_level(logging.INFO, "sat.integrations.trainer"):
        trainer.train()
    assert [(t.layer, t.step) for t in callback.transitions] == [(0, 6), (1, 6)]
    assert "layer 1 is sparse from step 6 on: density 0.444" in caplog.text
    assert not callback.controller.by_offset  # which is for models that begin from nothing
    assert len(callback.layouts) == 2
    for layout in callback.layouts.values():
        assert layout.shape == (6, 6)
        assert layout.mask[:, 0].all()  # CLS sees all ...
        assert layout.mask[:, :, 0].all()  # ... and is seen by all
    history = trainer.state.log_history
    observed = [line["step"] for line in history if "layer0/skewness" in line]
    assert observed == [2, 4, 6]
    logged = {line["step"]: line["sparse_layers"] for line in history if "loss" in line}
    assert logged[3] == 0
    assert logged[6] == logged[12] == 2


def test_the_learning_rate_factor_acts_on_steps_only(tmp_path):
    seen: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            optimizer = kwargs["optimizer"]
            inner = getattr(optimizer, "optimizer", optimizer)
            inner.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))

    callback = SparsityCallback(**SETTINGS, lr_factor=0.5)
    trainer = make_trainer(tmp_path, callback, lr_scheduler_type="constant")
    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [1e-3] * 6 + [5e-4] * 6
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-3] * len(trainer.optimizer.param_groups)


@pytest.mark.parametrize("stop", [4, 8])
def test_a_resumed_run_is_the_whole_run(tmp_path, stop):
    whole = make_trainer(tmp_path / "whole", SparsityCallback(**SETTINGS))
    whole.train()
    callback = SparsityCallback(**SETTINGS)
    resumed = make_trainer(tmp_path / "whole", callback)
    checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
    assert (checkpoint / STATE_FILE).is_file()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(callback.layouts) == 2
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    (checkpoint / STATE_FILE).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-{stop} has no {STATE_FILE}"):
        make_trainer(tmp_path / "whole", SparsityCallback(**SETTINGS)).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("stop", [3, 7])
def test_a_checkpoint_made_because_the_process_is_about_to_end_can_be_resumed(tmp_path, stop):
    class End(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop:  # what SIGTERM brings about, after some seconds
                for callback in trainer.callback_handler.callbacks:
                    if type(callback).__name__ == "JITCheckpointCallback":
                        callback.jit_manager.is_checkpoint_requested = True

    whole = SparsityCallback(**SETTINGS)
    make_trainer(tmp_path / "whole", whole, save_strategy="no").train()
    options = {"save_strategy": "no", "enable_jit_checkpoint": True}
    trainer = make_trainer(tmp_path, SparsityCallback(**SETTINGS), **options)
    trainer.add_callback(End())
    trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{stop}"]
    callback = SparsityCallback(**SETTINGS)
    resumed = make_trainer(tmp_path, callback, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == callback._steps == 12
    assert [(t.layer, t.step) for t in callback.transitions] == [(t.layer, t.step) for t in whole.transitions]
    assert [record["step"] for record in callback.history] == [record["step"] for record in whole.history]


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_what_goes_to_the_hub_during_training_is_whole(tmp_path, monkeypatch, strategy):
    pushed: dict[str | None, set[str]] = {}

    class Hub:
        def upload_folder(self, folder_path, path_in_repo=None, **kwargs):
            pushed[path_in_repo] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *args, **kwargs: Hub())
    monkeypatch.setattr(transformers.trainer, "PushInProgress", lambda jobs: None)
    trainer = make_trainer(tmp_path, SparsityCallback(**SETTINGS), steps=8, save_steps=8)
    trainer.args.push_to_hub, trainer.args.hub_strategy = True, transformers.trainer_utils.HubStrategy(strategy)
    trainer.hub_model_id, trainer.push_in_progress = "me/model", None
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    assert pushed[None] >= {"model.safetensors", LAYOUTS_FILE}
    layouts = (tmp_path / "checkpoint-8" / LAYOUTS_FILE).read_bytes()
    assert (tmp_path / LAYOUTS_FILE).read_bytes() == layouts
    if strategy == "checkpoint":
        assert pushed["last-checkpoint"] >= {"model.safetensors", LAYOUTS_FILE, STATE_FILE}


class Wrapper(torch.nn.Module):
    """What PEFT puts around a model, reduced to what the Trainer and SAT see of it."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside, self.config = inside, inside.config

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **more: Any) -> Any:
        return self.inside(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)


def test_checkpoints_of_a_wrapped_model_hold_its_layouts(tmp_path):
    callback = SparsityCallback(**SETTINGS)
    trainer = make_trainer(tmp_path, callback, steps=8)
    prepare(trainer.model, 24, 4)
    trainer.model = trainer.model_wrapped = Wrapper(trainer.model)
    trainer.train()
    states = load_layouts(make_model(), tmp_path / "checkpoint-8")
    for state, layout in zip(states.values(), callback.layouts.values(), strict=True):
        assert torch.equal(state.layout.mask, layout.mask)
    assert (tmp_path / "checkpoint-8" / STATE_FILE).is_file()


def test_a_model_of_which_a_part_was_prepared_is_saved_with_its_layouts(tmp_path):
    callback = SparsityCallback(**SETTINGS)
    trainer = make_trainer(tmp_path, callback, steps=8)
    prepare(trainer.model.bert, 24, 4)
    trainer.train()
    model, info = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "checkpoint-8", output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert all(state.is_sparse for state in load_layouts(model, tmp_path / "checkpoint-8").values())


def test_a_copy_that_is_made_while_training_saves_its_own_weights(tmp_path):
    copies: list[Any] = []

    class Copy(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                copies.append(copy.deepcopy(kwargs["model"]))

    trainer = make_trainer(tmp_path, SparsityCallback(**SETTINGS), steps=8)
    trainer.add_callback(Copy())
    trainer.train()
    copies[0].save_pretrained(tmp_path / "copy")
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "copy")
    name, weight = next(iter(copies[0].named_parameters()))
    assert torch.equal(saved.get_parameter(name), weight)
    assert not torch.equal(trainer.model.get_parameter(name), weight)


def test_checkpoints_hold_layouts_that_one_call_brings_back(tmp_path):
    callback = SparsityCallback(**SETTINGS)
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "final", attn_implementation="sat")
    load_layouts(model, str(tmp_path / "final"))
    batch = {key: torch.stack([torch.as_tensor(s[key]) for s in make_samples(4)]) for key in make_samples(1)[0]}
    with torch.no_grad():
        expected = trainer.model.cpu().eval()(**batch).logits
        assert torch.equal(model.eval()(**batch).logits, expected)
        dense = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "final")
        assert not torch.equal(dense.eval()(**batch).logits, expected)


def test_the_best_model_comes_back_in_its_own_phase(tmp_path, monkeypatch):
    callback = SparsityCallback(**SETTINGS)
    trainer = make_trainer(
        tmp_path,
        callback,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    losses = iter([3.0, 2.0, 1.0])
    original = trainer.evaluate

    def evaluate(*args, **kwargs):
        metrics = original(*args, **kwargs)
        metrics["eval_loss"] = next(losses)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert callback.layouts == {}, "the best model was dense"
    assert not callback.all_sparse
    monkeypatch.setattr(trainer, "evaluate", original)
    trainer.train()  # goes on from there


def test_a_training_that_was_broken_off_leaves_nothing_on_the_optimizer(tmp_path):
    class Stop(transformers.TrainerCallback):
        armed = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.armed and state.global_step == 8:
                self.armed = False
                raise KeyboardInterrupt

    callback = SparsityCallback(**SETTINGS, lr_factor=0.5)
    trainer = make_trainer(tmp_path, callback, lr_scheduler_type="constant")
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    seen: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            inner = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
            inner.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))

    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [5e-4] * 12  # it was sparse, and is; the factor acts once
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3}


def test_the_state_of_another_run_is_refused(tmp_path):
    for name, steps in (("one", 6), ("other", 4)):
        settings = SETTINGS | {"max_dense_steps": steps, "seed": 3}
        make_trainer(tmp_path / name, SparsityCallback(**settings), seed=steps).train()
    trainer = make_trainer(tmp_path / "other", SparsityCallback(**SETTINGS))
    with pytest.raises(ValueError, match="belong to different runs; set output_dir to the folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-8"))


def test_the_state_of_another_run_is_refused_where_nothing_was_observed(tmp_path):
    settings = {"block_size": 4, "density": 0.5, "start": "bigbird", "interval": 1, "revise_interval": 50}
    for seed, name in enumerate(("one", "other")):
        make_trainer(tmp_path / name, SparsityCallback(**settings, seed=seed), steps=4).train()
    trainer = make_trainer(tmp_path / "other", SparsityCallback(**settings), steps=6)
    with pytest.raises(ValueError, match="belong to different runs; set output_dir to the folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))


def test_a_prepared_model_keeps_its_sizes(tmp_path):
    callback = SparsityCallback(**{**SETTINGS, "block_size": 16})
    trainer = make_trainer(tmp_path, callback, steps=6)
    prepare(trainer.model, seq_len=24, block_size=8)
    trainer.train()
    assert {layout.block_size for layout in callback.layouts.values()} == {8}


def test_refuses_what_the_phases_refuse():
    with pytest.raises(ValueError, match="density is a share"):
        SparsityCallback(density=2.0)
    with pytest.raises(TypeError, match="densty"):
        SparsityCallback(densty=0.5)


def bidirectional_llama() -> Any:
    config = small(transformers.LlamaConfig)
    config.is_causal = False
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize("settings", [{"mask": "direct"}, {"agreement": 0.5, "agreement_lag": 1}])
@pytest.mark.parametrize(
    "make",
    [
        bidirectional_llama,
        # Its modules do not say whether they are causal; its calls do.
        lambda: transformers.LayoutLMForSequenceClassification(small(transformers.LayoutLMConfig)),
    ],
)
def test_layouts_of_models_that_look_ahead_do_so(tmp_path, make, settings):
    torch.manual_seed(0)
    callback = SparsityCallback(**{**SETTINGS, "density": 0.5, **settings})
    trainer = make_trainer(tmp_path, callback, steps=8, save_strategy="no")
    trainer.model = trainer.model_wrapped = make()
    trainer.train()
    assert not any(attention.is_causal for attention in callback.attentions.values())
    assert all(layout.mask.triu(1).any() for layout in callback.layouts.values())
    assert [layout.density for layout in callback.layouts.values()] == [0.5, 0.5]


def test_whether_attention_is_causal_is_known_where_nothing_is_observed():
    # Of several processes, those of a higher rank may have no sample to look at.
    model = transformers.LayoutLMForSequenceClassification(small(transformers.LayoutLMConfig))
    states = prepare(model, 24, 4)
    assert all(state.is_causal for state in states.values())
    model.train()(input_ids=torch.ones(1, 24, dtype=torch.long))
    assert not any(state.is_causal or state.statistics for state in states.values())


def test_a_decoder_looks_back_only(tmp_path):
    callback = SparsityCallback(**{**SETTINGS, "density": 0.5})
    trainer = make_trainer(tmp_path, callback, steps=8, save_strategy="no")
    trainer.model = trainer.model_wrapped = transformers.LlamaForSequenceClassification(small(transformers.LlamaConfig))
    trainer.train()
    assert len(callback.layouts) == 2
    assert not any(layout.mask.triu(1).any() for layout in callback.layouts.values())


def test_a_start_that_took_the_model_for_causal_says_so_and_revises(tmp_path, caplog):
    settings = {"density": 0.5, "block_size": 4, "start": "window", "interval": 1, "revise_interval": 2}
    callback = SparsityCallback(**settings)
    trainer = make_trainer(tmp_path, callback, steps=8, save_strategy="no")
    config = small(transformers.LayoutLMConfig)
    trainer.model = trainer.model_wrapped = transformers.LayoutLMForSequenceClassification(config)
    trainer.train()
    assert caplog.text.count("the attention turns out to be not causal; the window that training began with") == 1
    assert any(layout.mask.triu(1).any() for layout in callback.layouts.values())


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, SparsityCallback(**SETTINGS))
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: 2))
    monkeypatch.setattr(trainer, "_wrap_model", lambda model, *args, **kwargs: model)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        trainer.train()


class Searches(transformers.TrainerCallback):
    """Sets what the Trainer sets in a search for hyperparameters."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.is_hyper_param_search = True


def test_each_trial_of_a_search_has_its_state_in_its_own_checkpoints(tmp_path, monkeypatch):
    make_trainer(tmp_path, SparsityCallback(**SETTINGS), steps=8).train()
    before = (tmp_path / "checkpoint-4" / STATE_FILE).read_bytes()
    for trial in range(2):
        trainer = make_trainer(
            tmp_path, SparsityCallback(**SETTINGS), steps=8, load_best_model_at_end=True, eval_strategy="steps",
            eval_steps=4,
        )  # fmt: skip
        # What hyperparameter_search does, without one of the libraries that it needs.
        trainer.callback_handler.callbacks.insert(0, Searches())
        monkeypatch.setattr(trainer, "_get_output_dir", lambda trial, at=tmp_path / f"run-{trial}": str(at))
        trainer.train()
        assert all((tmp_path / f"run-{trial}" / f"checkpoint-{step}" / STATE_FILE).is_file() for step in (4, 8))
    assert (tmp_path / "checkpoint-4" / STATE_FILE).read_bytes() == before


def test_a_guard_without_evaluation_is_warned_of(tmp_path, caplog):
    make_trainer(tmp_path, SparsityCallback(**SETTINGS, guard=0.5), steps=1, eval_strategy="no").train()
    assert "guard=0.5 goes by the loss on evaluation data; without an eval_strategy it does nothing" in caplog.text


class Losses(transformers.TrainerCallback):
    """Evaluation losses by the step, in the place of those measured."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name in list(kwargs["metrics"]):
            if name.endswith("_loss"):
                kwargs["metrics"][name] = 1.0 if state.global_step < 6 else 2.0


class Elsewhere(transformers.TrainerCallback):
    """Another evaluation, during the training, of data that got worse before the switch."""

    def __init__(self) -> None:
        self.done: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (5, 9):
            self.trainer.evaluate(make_samples(4), metric_key_prefix="test")
            self.done.append(state.global_step)


def guarded(folder: Path) -> tuple[SparsityCallback, Any, Elsewhere]:
    # No better than with a fifth of the blocks however many are added: in the end everything is dense again.
    settings = SETTINGS | {"density": 0.2, "keep_first_tokens": 0, "guard": 0.5, "guard_patience": 1}
    callback = SparsityCallback(**settings)
    trainer = make_trainer(folder, callback, steps=16, eval_strategy="steps", eval_steps=2)
    trainer.callback_handler.callbacks.insert(0, Losses())
    trainer.add_callback(elsewhere := Elsewhere())
    elsewhere.trainer = trainer
    return callback, trainer, elsewhere


def test_the_guard_goes_by_the_evaluations_of_the_training(tmp_path):
    callback, trainer, elsewhere = guarded(tmp_path)
    judged: list[float] = []
    after = callback.after_validation

    def after_validation(loss: float) -> None:
        judged.append(loss)
        after(loss)

    callback.after_validation = after_validation
    trainer.train()
    assert judged == [1.0] * 2 + [2.0] * 6
    assert elsewhere.done == [5, 9]
    assert callback.controller.gave_up_at is not None or callback.revisions, "the loss doubled, nothing was done"
    latest = callback._guard.state_dict()
    trainer.evaluate(make_samples(4))  # not the training's either
    assert callback._guard.state_dict() == latest
    assert len(judged) == 8
    again, resumed, _ = guarded(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.controller.gave_up_at == callback.controller.gave_up_at
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_the_guard_needs_the_loss_of_one_evaluation(tmp_path):
    several = make_trainer(tmp_path / "several", SparsityCallback(**SETTINGS, guard=0.5), eval_strategy="steps",
                           eval_steps=2)  # fmt: skip
    several.eval_dataset = {"a": make_samples(8), "b": make_samples(4)}
    with pytest.raises(ValueError, match=r"guard=0\.5 needs eval_loss, but the evaluation gives eval_a_loss"):
        several.train()


def test_a_second_training_goes_on_sparsely_and_can_be_resumed(tmp_path):
    callback = SparsityCallback(**SETTINGS)
    trainer = make_trainer(tmp_path, callback, steps=8)
    trainer.train()
    layouts = [layout.mask.clone() for layout in callback.layouts.values()]
    trainer.train()
    assert callback._steps == 16
    resumed = SparsityCallback(**SETTINGS)
    again = make_trainer(tmp_path, resumed, steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed._steps == 16
    assert [(t.layer, t.step) for t in resumed.transitions] == [(0, 6), (1, 6)]
    assert all(map(torch.equal, layouts, (layout.mask for layout in resumed.layouts.values())))
    # And one whose second training is observed, for the first one was too short to switch.
    short = SparsityCallback(**SETTINGS)
    trainer = make_trainer(tmp_path / "short", short, steps=4)
    trainer.train()
    trainer.train()
    assert [t.step for t in short.transitions] == [6, 6]
    resumed = SparsityCallback(**SETTINGS)
    again = make_trainer(tmp_path / "short", resumed, steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-4"))
    assert resumed._steps == 10


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: raw[:200] + bytes(50) + raw[250:]]
)
def test_a_damaged_state_is_named(tmp_path, damage):
    make_trainer(tmp_path, SparsityCallback(**SETTINGS), steps=8).train()
    file = tmp_path / "checkpoint-4" / STATE_FILE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{STATE_FILE} is not whole .*resume from another checkpoint"):
        make_trainer(tmp_path, SparsityCallback(**SETTINGS)).train(resume_from_checkpoint=str(file.parent))


@pytest.mark.parametrize("missing", ["controller", "steps", "history"])
def test_a_state_that_lacks_something_is_named(tmp_path, missing):
    make_trainer(tmp_path, SparsityCallback(**SETTINGS), steps=8).train()
    file = tmp_path / "checkpoint-4" / STATE_FILE
    state = torch.load(file, weights_only=True)
    del state[missing]
    torch.save(state, file)
    with pytest.raises(ValueError, match=rf"{STATE_FILE} is not whole"):
        make_trainer(tmp_path, SparsityCallback(**SETTINGS)).train(resume_from_checkpoint=str(file.parent))
