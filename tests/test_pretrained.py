"""Pretrained models of transformers: the classifier around them, and whole runs of the command on small ones."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from sat import cli, train
from sat.attention import AdaptiveAttention
from sat.data import tokens
from sat.data.pictures import read_processor
from sat.models import PretrainedClassifier
from sat.module import ClassificationModule

from .data.conftest import png
from .data.models import write_bert, write_pairs, write_tokenizer, write_vit
from .test_train import interrupt_at, refused, run, run_folder

transformers = pytest.importorskip("transformers")

MRPC = """
data: {name: mrpc, path: data, cache_dir: cache, seq_len: 20, batch_size: 8}
model: {pretrained: model, block_size: 4, dropout: 0.1}
optimizer: {lr: 3.0e-3, warmup_steps: 3, layer_decay: 0.8}
sparsity: {density: 0.5, theta: null, delta: 1000000.0, interval: 3, samples: 4, per_head: true, keep_first_tokens: 1}
trainer: {max_steps: 20, accelerator: cpu, val_check_interval: 7, check_val_every_n_epoch: null, log_every_n_steps: 5}
"""
VIT = """
data: {name: cifar10_rgb, path: data, cache_dir: cache, batch_size: 8, augment: true}
model: {pretrained: model, block_size: 4}
optimizer: {lr: 3.0e-3, warmup_steps: 3}
sparsity: {density: 0.5, theta: null, delta: 1000000.0, interval: 3, samples: 4, keep_first_tokens: 1}
trainer: {max_steps: 14, accelerator: cpu, val_check_interval: 7, check_val_every_n_epoch: null, log_every_n_steps: 5}
"""
SWITCH = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Models and data that the tests copy: making them takes longer than a run."""
    root = tmp_path_factory.mktemp("pretrained")
    write_bert(root / "bert")
    write_vit(root / "vit")
    write_pairs(root / "pairs")
    generator = np.random.default_rng(0)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (root / "pictures").mkdir()
    for split, size in (("train", 50), ("test", 20)):
        pictures = [
            {"bytes": png(generator.integers(0, 256, (32, 32, 3), np.uint8)), "path": None} for _ in range(size)
        ]
        table = pa.table({"img": pa.array(pictures, kind), "label": [i % 10 for i in range(size)]})
        pq.write_table(table, root / "pictures" / f"{split}.parquet")
    return root


@pytest.fixture
def mrpc(folders, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "bert", "model")
    shutil.copytree(folders / "pairs", "data")
    Path("mrpc.yaml").write_text(MRPC)
    return Path("mrpc.yaml")


@pytest.fixture
def vit(folders, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "vit", "model")
    shutil.copytree(folders / "pictures", "data")
    Path("vit.yaml").write_text(VIT)
    return Path("vit.yaml")


def last_checkpoint(name: str) -> dict:
    return torch.load(run_folder(name) / "checkpoints" / "last.ckpt", weights_only=True)


class TestRuns:
    def test_a_bert_on_pairs(self, mrpc, capsys):
        summary = run("--config", mrpc)
        folder = run_folder("mrpc")
        assert json.loads((folder / "summary.json").read_text()) == summary
        assert [(t["step"], t["forced"]) for t in summary["transitions"]] == [(SWITCH, False)] * 2
        assert summary["pretrained"] == "model"
        assert "transformers" in summary["versions"]
        assert summary["density"] == 0.52  # 13 of 5 x 5: the first row and column, and the diagonal
        assert set(summary["test_accuracy"]) == set(summary["test_f1"]) == {"final", "best"}
        assert summary["validated_at"] == 14
        printed = capsys.readouterr().out
        assert "mrpc: 20 tokens, 2 classes" in printed
        assert "new and random at first: classifier.bias, classifier.weight" in printed
        for line in ("validation F1 at step 14", "test F1, final model", "test F1, best model", "test accuracy, final"):
            assert line in printed
        header = (folder / "csv/version_0/metrics.csv").read_text().splitlines()[0].split(",")
        assert {"layer1/skewness", "val/acc", "val/f1", "train/loss"} <= set(header)
        checkpoint = last_checkpoint("mrpc")
        masks = [x for name, x in checkpoint["state_dict"].items() if name.endswith(".sat.layout_mask")]
        assert [mask.shape for mask in masks] == [(2, 5, 5)] * 2
        assert all(mask[:, 0].all() and mask[:, :, 0].all() for mask in masks)  # CLS

    def test_the_model_is_there_for_transformers_at_the_end(self, mrpc):
        from datasets import ClassLabel, Dataset

        from sat.integrations.transformers import load_layouts

        for file in Path("data").glob("*.parquet"):  # as the hub has them: the labels have names
            pairs = Dataset.from_parquet(str(file), cache_dir="hub")
            pairs.cast_column("label", ClassLabel(names=["different", "equivalent"])).to_parquet(file)
        run("--config", mrpc)
        folder = run_folder("mrpc") / "model"
        assert not (folder.parent / "model.partial").exists()
        modes = {file.stat().st_mode for file in (folder.parent / "summary.json", *folder.iterdir())}
        assert len(modes) == 1  # whoever may read the summary may read the model
        final = last_checkpoint("mrpc")["state_dict"]
        again = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="sat")
        assert all(torch.equal(final[f"model.model.{name}"], weight) for name, weight in again.state_dict().items())
        assert again.config.id2label == {0: "different", 1: "equivalent"}
        layouts = {name: state.layout_mask for name, state in load_layouts(again, folder).items()}
        assert len(layouts) == 2
        assert all(torch.equal(mask, final[f"model.model.{name}.sat.layout_mask"]) for name, mask in layouts.items())
        assert transformers.AutoTokenizer.from_pretrained(folder).model_max_length >= 20
        # What stands there is a model like any other, to train further.
        summary = run("--config", mrpc, "--model.pretrained", folder, "--name", "further", "--trainer.max_steps", 2)
        assert summary["steps"] == 2

    def test_where_the_last_model_is_the_best_it_is_tested_once(self, mrpc, monkeypatch):
        tests, test = [], train.Run._test
        monkeypatch.setattr(train.Run, "_test", lambda self: tests.append(1) or test(self))
        summary = run("--config", mrpc, "--trainer.max_steps", 7)
        assert summary["best_checkpoint"]["step"] == 7
        assert len(tests) == 1
        assert summary["test_f1"]["final"] == summary["test_f1"]["best"]

    @pytest.mark.parametrize("mask", ["direct", "fisher"])
    def test_padding_to_the_longest_text_changes_nothing_but_the_time(self, mrpc, monkeypatch, mask):
        monkeypatch.setattr(tokens, "MULTIPLE", 3)
        lengths, attend = set(), AdaptiveAttention.forward
        monkeypatch.setattr(
            AdaptiveAttention,
            "forward",
            lambda self, query, *rest, **more: lengths.add(query.shape[2]) or attend(self, query, *rest, **more),
        )
        options = ["--trainer.precision", "64-true", "--model.dropout", 0, "--sparsity.mask", mask]
        options += ["--sparsity.keep_first_tokens", 0]
        full = run("--config", mrpc, "--name", "full", *options)
        assert lengths == {20}
        short = run("--config", mrpc, "--name", "short", "--data.padding", "longest", *options)
        assert lengths == {15, 18, 20}
        assert [t["step"] for t in short["transitions"]] == [t["step"] for t in full["transitions"]] == [SWITCH] * 2
        weights = [last_checkpoint(name)["state_dict"] for name in ("full", "short")]
        masks = [name for name in weights[0] if name.endswith("layout_mask")]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in masks)
        assert not all(weights[0][name].all() for name in masks)
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[1][name].double(), weight.double(), atol=1e-9, rtol=1e-7)

    def test_f1_is_that_of_scikit_learn_and_chooses_the_best_model(self, mrpc):
        from sklearn.metrics import f1_score

        summary = run("--config", mrpc)
        args, _ = cli.parse(["--config", str(mrpc)])
        data = cli.make_data(args)
        data.setup()
        model = cli.make_model(args, data)
        module = ClassificationModule(model, 2, metric="f1")
        for name, file in (("final", "last.ckpt"), ("best", "best.ckpt")):
            checkpoint = torch.load(run_folder("mrpc") / "checkpoints" / file, weights_only=True)
            module.load_state_dict(checkpoint["state_dict"])
            module.eval()
            with torch.no_grad():
                predicted = [int(x) for batch in data.test_dataloader() for x in module(batch).argmax(1)]
            labels = [int(x) for batch in data.test_dataloader() for x in batch["labels"]]
            assert summary["test_f1"][name] == pytest.approx(f1_score(labels, predicted), abs=1e-4)
        (state,) = (s for key, s in last_checkpoint("mrpc")["callbacks"].items() if key.startswith("ModelCheckpoint"))
        assert state["monitor"] == "val/f1"

    def test_dense(self, mrpc):
        summary = run("--config", mrpc, "--model.attention", "dense", "--trainer.max_steps", 8)
        assert set(summary["median_step_ms"]) == {"dense"}
        assert summary["attention"] == "dense"
        assert not (run_folder("mrpc") / "layouts").exists()
        assert not any(".sat." in name for name in last_checkpoint("mrpc")["state_dict"])

    def test_until_the_switch_adaptive_is_dense(self, mrpc):
        states = []
        for attention in ("adaptive", "dense"):
            options = ["--trainer.max_steps", 6, "--model.attention", attention, "--name", attention]
            run("--config", mrpc, *options)
            states.append(last_checkpoint(attention)["state_dict"])
        assert states[1].keys() <= states[0].keys()
        for name, tensor in states[1].items():
            assert torch.equal(tensor, states[0][name]), name

    @pytest.mark.parametrize("step", [5, SWITCH])
    def test_interrupted_and_resumed_is_bit_for_bit_the_whole_run(self, mrpc, monkeypatch, capsys, step):
        self._resume(mrpc, monkeypatch, capsys, step, 20)

    def test_with_pictures_that_are_changed_at_random_too(self, vit, monkeypatch, capsys):
        self._resume(vit, monkeypatch, capsys, 8, 14)  # an epoch has 5 steps

    def _resume(self, config, monkeypatch, capsys, step, steps):
        name = config.stem
        run("--config", config, "--name", "whole")
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            assert f"interrupted at step {step}" in refused(capsys, "--config", config, status=130)
        assert run("--config", config, "--ckpt_path", "last")["steps"] == steps
        whole, resumed = last_checkpoint("whole"), last_checkpoint(name)
        for key, tensor in whole["state_dict"].items():
            assert torch.equal(tensor, resumed["state_dict"][key]), key
        summaries = [json.loads((run_folder(n) / "summary.json").read_text()) for n in ("whole", name)]
        keys = {"transitions", "test_accuracy", "validation_accuracy", "best_checkpoint", "test_f1", "validation_f1"}
        for key in keys & set(summaries[0]):
            assert summaries[0][key] == summaries[1][key], key
        assert ("validation_f1" in summaries[0]) == (name == "mrpc")

    def test_the_saved_config_repeats_the_run(self, mrpc):
        run("--config", mrpc, "--trainer.max_steps", 4, "--model.freeze_backbone", "true")
        saved = run_folder("mrpc") / "config.yaml"
        content = yaml.safe_load(saved.read_text())
        assert content["model"]["pretrained"] == "model"
        assert content["model"]["freeze_backbone"] is True
        run("--config", saved, "--name", "again")
        first, second = (last_checkpoint(name)["state_dict"] for name in ("mrpc", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_a_vit_on_pictures(self, vit, capsys):
        summary = run("--config", vit)
        printed = capsys.readouterr().out
        assert "vit: 16 x 16 pixels, 10 classes" in printed
        assert "random at first" not in printed
        assert "F1" not in printed
        assert "test_f1" not in summary
        masks = [x for name, x in last_checkpoint("vit")["state_dict"].items() if name.endswith(".sat.layout_mask")]
        assert [mask.shape for mask in masks] == [(2, 5, 5)] * 2  # 16 patches and CLS, in blocks of 4
        model = run_folder("vit") / "model"
        assert read_processor(str(model)) == read_processor("model")
        assert transformers.AutoModelForImageClassification.from_pretrained(model).config.image_size == 16
        assert run("--config", vit, "--model.attention", "dense", "--trainer.max_steps", 3)["steps"] == 3

    def test_a_frozen_backbone_stays_as_it_is_and_the_head_learns(self, mrpc, capsys):
        run("--config", mrpc, "--model.freeze_backbone", "true", "--trainer.max_steps", 12)
        assert "34 parameters are trained" in capsys.readouterr().out
        weights = last_checkpoint("mrpc")["state_dict"]
        before = transformers.AutoModel.from_pretrained("model").state_dict()
        for name, tensor in before.items():
            assert torch.equal(tensor, weights[f"model.model.bert.{name}"]), name
        assert weights["model.model.bert.encoder.layer.0.attention.self.sat.sparse"]  # it is made sparse all the same
        torch.manual_seed(0)
        args, _ = cli.parse(["--config", str(mrpc)])
        train.seed_everything(args.seed, verbose=False)
        at_first = cli.make_model(args, cli.make_data(args)).model.classifier.weight
        assert not torch.equal(at_first, weights["model.model.classifier.weight"])

    def test_longer_sequences_than_the_model_was_trained_for(self, mrpc, capsys):
        longer = ["--config", mrpc, "--data.seq_len", 72, "--trainer.max_steps", 10]
        message = refused(capsys, *longer)
        assert (
            "data.seq_len is 72, but model has positions for 32; set --data.seq_len 32, or --model.extend_pos"
            in message
        )
        assert run(*longer, "--model.extend_positions", "true")["steps"] == 10
        table = last_checkpoint("mrpc")["state_dict"]["model.model.bert.embeddings.position_embeddings.weight"]
        assert table.shape == (72, 16)

    def test_larger_pictures_than_the_model_was_trained_for(self, vit, capsys):
        larger = ["--config", vit, "--data.image_size", 24, "--trainer.max_steps", 10]
        assert "data.image_size is 24, but model has positions for 16; set" in refused(capsys, *larger)
        run(*larger, "--model.extend_positions", "true")
        state = last_checkpoint("vit")["state_dict"]
        assert state["model.model.vit.embeddings.position_embeddings"].shape == (1, 37, 16)
        smaller = refused(capsys, "--config", vit, "--data.image_size", 8)
        assert "model takes pictures of 16 pixels, the data gives 8; set --data.image_size 16" in smaller

    @pytest.mark.long
    def test_compiled(self, mrpc, monkeypatch):
        compile_model = torch.nn.Module.compile
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_model(self, backend="eager", **kw))
        write_bert(Path("smaller"), num_hidden_layers=1)
        short = ["--trainer.max_steps", 4, "--trainer.limit_val_batches", 0, "--trainer.limit_test_batches", 0]
        options = ["--compile", "true", "--model.pretrained", "smaller", "--sparsity.interval", 1, *short]
        assert len(run("--config", mrpc, *options)["transitions"]) == 1


class TestClassifier:
    def test_logits_are_those_of_the_model(self, folders):
        model = PretrainedClassifier(2, "text", pretrained=str(folders / "bert"))
        assert model.new_weights == {"classifier.weight", "classifier.bias"}
        assert all(module.training for module in model.modules())
        model.eval()
        ids, mask = torch.randint(5, 14, (2, 9)), torch.arange(9) < torch.tensor([[9], [5]])
        types = torch.randint(0, 2, (2, 9))
        expected = model.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
        got = model(input_ids=ids, attention_mask=mask, token_type_ids=types, unknown=types)
        assert got.equal(expected)
        assert not model(input_ids=ids, attention_mask=mask).equal(expected)

    @pytest.mark.parametrize("known", [None, 5])
    def test_a_decoder_reads_its_answer_before_the_padding(self, tmp_path, known):
        """Whatever its files say of padding, or do not."""
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, pad_token_id=known, **sizes)
        transformers.LlamaModel(config).save_pretrained(tmp_path)
        model = PretrainedClassifier(2, "text", pretrained=str(tmp_path)).eval()
        model.pad_with(2)
        assert model.model.config.pad_token_id == 2
        ids = torch.randint(6, 20, (2, 9))
        ids[1, 6:] = 2
        together = model(input_ids=ids, attention_mask=ids != 2)
        assert together[1].allclose(model(input_ids=ids[1:, :6])[0], atol=1e-6)
        assert together[0].allclose(model(input_ids=ids[:1])[0], atol=1e-6)

    def test_positions_that_are_numbered_behind_other_padding(self, tmp_path):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.RobertaConfig(vocab_size=20, pad_token_id=1, **sizes)
        transformers.RobertaModel(config).save_pretrained(tmp_path)
        model = PretrainedClassifier(2, "text", pretrained=str(tmp_path))
        model.pad_with(1)
        with pytest.raises(ValueError, match=r"behind its padding, token 1, and the tokenizer pads with 0; give the"):
            model.pad_with(0)

    def test_a_head_for_other_classes_is_made_anew(self, folders, tmp_path):
        same = PretrainedClassifier(10, "pictures", pretrained=str(folders / "vit"))
        assert same.new_weights == set()
        other = PretrainedClassifier(3, "pictures", pretrained=str(folders / "vit"))
        assert other.new_weights == {"classifier.weight", "classifier.bias"}
        assert other(pixel_values=torch.zeros(2, 3, 16, 16)).shape == (2, 3)

    def test_half_precision_files_are_trained_in_float32(self, folders, tmp_path):
        model = transformers.AutoModel.from_pretrained(folders / "bert", dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        loaded = PretrainedClassifier(2, "text", pretrained=str(tmp_path))
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}

    def test_dropout(self, folders):
        def probabilities(**options):
            model = PretrainedClassifier(2, "text", pretrained=str(folders / "bert"), **options)
            return {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}, model.model.config

        assert probabilities()[0] == {0.1}
        found, config = probabilities(dropout=0.3)
        assert found == {0.3}
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.3)
        assert probabilities(dropout=0.0)[0] == {0.0}

    def test_frozen_parts_have_no_gradients_but_what_is_new_has(self, folders, tmp_path):
        bert = transformers.AutoModel.from_pretrained(folders / "bert", add_pooling_layer=False)
        bert.save_pretrained(tmp_path)
        model = PretrainedClassifier(2, "text", pretrained=str(tmp_path), freeze_backbone=True)
        model(input_ids=torch.randint(5, 14, (2, 9))).sum().backward()
        with_gradient = {name.removeprefix("model.") for name, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == model.new_weights
        assert with_gradient == {
            "classifier.weight",
            "classifier.bias",
            "bert.pooler.dense.weight",
            "bert.pooler.dense.bias",
        }

    @pytest.mark.parametrize(
        ("kind", "sizes", "expected"),
        [
            ("Bert", {"max_position_embeddings": 40}, 40),
            ("Roberta", {"max_position_embeddings": 40, "pad_token_id": 1}, 38),
            (
                "DistilBert",
                {"max_position_embeddings": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
                40,
            ),
            ("GPT2", {"n_positions": 40, "pad_token_id": 0}, 40),
            ("ModernBert", {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2}, None),
        ],
    )
    def test_architectures(self, tmp_path, kind, sizes, expected):
        small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        if kind == "DistilBert":
            small = {}
        config = getattr(transformers, f"{kind}Config")(vocab_size=20, **small, **sizes)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
        model = PretrainedClassifier(3, "text", pretrained=str(tmp_path), dropout=0.2)
        assert model.max_length == expected
        ids = torch.randint(4, 20, (2, 9))
        inputs = {"input_ids": ids, "attention_mask": torch.ones(2, 9, dtype=torch.bool), "token_type_ids": ids % 2}
        assert model(**inputs).shape == (2, 3)


class TestBadInput:
    @pytest.mark.parametrize("name", ["nowhere/none", "./nowhere", "nowhere"])
    def test_a_name_that_is_nothing(self, mrpc, capsys, name):
        tokenizer = ["--data.tokenizer", "model"]
        message = refused(capsys, "--config", mrpc, "--model.pretrained", name, *tokenizer)
        assert f"{name!r} is no folder, and the hub gives no model of that name (" in message
        assert "correct model.pretrained, or connect to the internet" in message
        message = refused(capsys, "--config", mrpc, "--model.pretrained", name)
        assert f"{name!r} is no folder, and the hub gives no tokenizer of that name (" in message
        assert not Path("runs").exists()

    def test_none_is_chosen(self, vit, capsys):
        message = refused(capsys, "--config", vit, "--model.pretrained", "null")
        assert "needs the image processor of a model; set model.pretrained" in message
        message = refused(capsys, "--config", vit, "--model.pretrained", "null", "--data.processor", "model")
        assert "no pretrained model is chosen; set model.pretrained to a name on the Hugging Face hub or" in message
        message = refused(capsys, "--config", "vit_cifar10")
        assert "set model.pretrained" in message

    def test_data_and_models_that_do_not_belong_together(self, mrpc, capsys):
        digits = refused(capsys, "--data.name", "digits", "--model.pretrained", "model")
        assert "data set digits gives token ids of its own; leave model.pretrained out, or choose one of cif" in digits
        ours = refused(capsys, "--data.name", "imdb")
        assert (
            "imdb gives inputs for pretrained models only; set model.pretrained to a hub name or a folder, or" in ours
        )
        ids = [name for name, data in cli.DATASETS.items() if data.inputs == "ids"]
        assert f"choose one of {', '.join(ids)} as data.name" in ours
        assert {"digits", "yelp", "listops"} <= {*ids}

    def test_options_of_the_other_kind_of_model(self, mrpc, capsys):
        assert "num_layers" in refused(capsys, "--config", mrpc, "--model.num_layers", 3)
        assert "freeze_backbone" in refused(capsys, "--config", "ag_news", "--model.freeze_backbone", "true")

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (["--model.attention", "longformer"], "attention"),
            (["--model.dropout", 1.0], "dropout must be at least 0 and below 1, got 1.0"),
            (["--model.block_size", 0], "block_size must be at least 1, got 0"),
            (["--model.block_size", 100], "block_size 100 exceeds seq_len 20"),
            (["--optimizer.layer_decay", 0], "layer_decay must be above 0 and at most 1"),
            (["--data.path", "nowhere"], "there is no nowhere to read MRPC from"),
            (["--data.tokenizer", "data"], "the folder data holds no tokenizer that can be read"),
            (["--model.pretrained", "data", "--data.tokenizer", "model"], "the folder data holds no pretrained model"),
        ],
    )
    def test_options_out_of_range(self, mrpc, capsys, options, expected):
        assert expected in refused(capsys, "--config", mrpc, *options)
        assert not list(Path().glob("runs/*/*"))

    def test_another_models_tokenizer(self, mrpc, capsys):
        write_tokenizer(Path("larger"), [f"word{i}" for i in range(20)])
        message = refused(capsys, "--config", mrpc, "--data.tokenizer", "larger")
        assert (
            "the tokenizer has 25 tokens, of which model knows 14; give the model's own as --data.tokenizer" in message
        )

    def test_lengths_that_vary_in_a_compiled_model(self, mrpc, capsys):
        error = refused(capsys, "--config", mrpc, "--compile", "true", "--data.padding", "longest")
        assert "with --compile true set --data.padding max_length" in error

    def test_a_model_for_another_task(self, mrpc, folders, capsys):
        message = refused(capsys, "--config", mrpc, "--model.pretrained", folders / "vit", "--data.tokenizer", "model")
        assert "is a vit, which transformers has no SequenceClassification model for; choose" in message

    def test_damaged_files(self, mrpc, capsys):
        weights = Path("model/model.safetensors")
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2])
        assert "the folder model holds no pretrained model that can be read (" in refused(capsys, "--config", mrpc)
        weights.unlink()
        assert "the folder model holds no pretrained model that can be read (" in refused(capsys, "--config", mrpc)
        Path("model/config.json").write_text("{")
        assert "the folder model holds no" in refused(capsys, "--config", mrpc)

    def test_weights_of_another_architecture(self, mrpc, capsys):
        config = json.loads(Path("model/config.json").read_text())
        small = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
        transformers.DistilBertConfig(vocab_size=config["vocab_size"], **small).save_pretrained("model")
        message = refused(capsys, "--config", mrpc)
        assert "model has 3 of the 36 weights of the backbone of DistilBertForSequenceClassification, and" in message

    def test_a_checkpoint_of_the_other_attention(self, mrpc, monkeypatch, capsys):
        run("--config", mrpc, "--trainer.max_steps", 4)
        message = refused(capsys, "--config", mrpc, "--ckpt_path", "last", "--model.attention", "dense")
        assert "was trained with model.attention=adaptive, this run has dense" in message

    def test_without_transformers(self, vit, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "transformers", None)
        message = refused(capsys, "--config", vit)
        assert "need transformers, which is not installed; install it with pip install 'transformers>=5.10'" in message


class TestRealModels:
    def test_the_vit_knows_its_pictures(self, shared_data, tmp_path):
        model, data = shared_data / "models" / "vit-cifar10-d128-l4", shared_data / "data" / "cifar10"
        if not (model.is_dir() and data.is_dir()):
            pytest.skip("no copy of the ViT or of CIFAR-10 at hand")
        for split in ("train", "test"):
            pq.write_table(pq.read_table(data / "test.parquet").slice(0, 500), tmp_path / f"{split}.parquet")
        options = ["--data.path", str(tmp_path), "--data.cache_dir", str(tmp_path / "cache")]
        args, _ = cli.parse(["--config", "vit_cifar10", "--model.pretrained", str(model), *options])
        module = cli.make_data(args)
        module.setup()
        classifier = cli.make_model(args, module).eval()
        sizes = {(a.num_heads, a.seq_len) for a in classifier.modules() if isinstance(a, AdaptiveAttention)}
        assert sizes == {(4, 65)}
        with torch.no_grad():
            right = sum(
                int((classifier(pixel_values=b["pixel_values"]).argmax(1) == b["labels"]).sum())
                for b in module.test_dataloader()
            )
        assert right == 355  # 71.0 %, as measured where the weights come from
