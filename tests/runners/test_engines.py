"""An exported program gives, in every engine that is installed, what the model gives in PyTorch."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from oracles import make_images, make_vit, relative
from registered_settings import settings_of
from saccade.core.registry import registry
from saccade.errors import UserError
from saccade.model import AdaptiveViT
from saccade.runners import engine as engines
from saccade.runners.exported import Exported
from saccade.runners.runner import ENGINES, Runner

TOGETHER = "grid(24) | imagepiece(p=0.6, merge=0.2) | evit(0.7, fuse=True, at=2) | tome(r=1)"
TIES = "algm(0.75, 0.4)"  # sorts what is only 0 or 1: all is ties
EXPORTED = ("torch", "aoti", "onnx", "openvino")


def installed(name: str) -> None:
    for package in engines.import_module(f"saccade.runners.engines.{name}").PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed")


def model_of(setting: str, family: str = "vit") -> AdaptiveViT:
    return AdaptiveViT(make_vit(family), setting).eval()


@torch.no_grad()
def agrees(model: AdaptiveViT, name: str) -> None:
    session = model.runner(name, provenance=True)
    for count in (1, 2, 5):
        images = make_images(model.vit, count, model.input_size(), seed=count)
        out, found = model(images), session.all(images)
        assert relative(found["logits"], out.logits) <= 1e-5
        assert torch.equal(found["owner"], out.trace.blocks[-1].owner.int())
        left = torch.tensor([len(set(row.tolist()) - {-1}) for row in found["owner"]])
        assert torch.equal(found["tokens"].long(), left + model.backbone.num_prefix)


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("torch", TOGETHER),
        pytest.param("onnx", TIES, marks=pytest.mark.slow),
        pytest.param("onnx", TOGETHER, marks=pytest.mark.slow),
        ("openvino", TIES),
        pytest.param("aoti", TOGETHER, marks=pytest.mark.slow),
    ],
)
def test_any_batch_gives_the_same(name, setting):
    installed(name)
    agrees(model_of(setting), name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "aoti")) for name in ENGINES if name in EXPORTED]
)
@torch.no_grad()
def test_a_deployed_model_gives_the_same_in_every_number_type(name):
    """Its engine is given images in fp32, whatever type the weights have."""
    installed(name)
    model = model_of("tome(r=2)")
    images = make_images(model.vit, 2)
    for dtype in engines.engine_of(name).dtypes():
        if dtype in ("fp32", "bf16"):
            deployed = model.deploy(Runner(dtype, name, 2)).eval()
            for _ in range(2):
                assert relative(deployed(images).logits, model(images).logits) <= (1e-5 if dtype == "fp32" else 0.1)
            assert deployed._deployment.failure is None


@pytest.mark.slow
def test_bytes_of_another_type_are_refused():
    """A package of AOTInductor does not check what it is given."""
    session = model_of("evit(0.5)").runner("aoti")
    with pytest.raises(UserError, match=r"images of torch\.bfloat16: this program takes torch\.float32"):
        session(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino"])
@pytest.mark.parametrize("method", registry())
def test_every_method_in_every_engine(name, method):
    installed(name)
    if (name, method) == ("openvino", "random_plus"):
        pytest.skip("refused, by a test of its own")
    agrees(model_of(settings_of(method)[2]), name)


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_weights_of_eight_bits(name, capfd):
    installed(name)
    if name == "openvino":
        pytest.importorskip("nncf", reason="NNCF is not installed", exc_type=ImportError)
    model = model_of("evit(0.5)")
    images = make_images(model.vit, 3)
    session = model.runner(name, dtype="int8")
    with torch.no_grad():
        assert 0 < relative(session(images), model(images).logits) <= 0.1
    assert session.dtype == "int8" and not capfd.readouterr().out


def test_batches_beyond_those_that_a_program_is_compiled_for():
    installed("openvino")
    from saccade.runners.engines import openvino

    model = model_of("evit(0.5)")
    session = model.runner("openvino")
    with torch.no_grad():
        for count in (2, 1, 3, 4, 2, 1, 4):  # 1 and the first other have programs of their own
            images = make_images(model.vit, count, seed=count)
            assert relative(session(images), model(images).logits) <= 1e-5
    assert openvino.FIXED == 2


@pytest.mark.parametrize(("batch", "expected"), [(None, "[?,3,64,64]"), (3, "[3,3,64,64]")])
def test_a_file_says_the_sizes_that_are_not_free(batch, expected, tmp_path):
    """OpenVINO's reader takes every size of an exported program for free, and runs such a program slower."""
    installed("openvino")
    from saccade.runners.engines import openvino

    openvino.write(Exported.of(model_of("tome(r=2)"), Runner("fp32", "openvino"), batch), tmp_path, "fp32")
    assert str(openvino.core().read_model(tmp_path / "model.xml").input(0).partial_shape) == expected


def test_a_batch_runs_in_equal_parts_side_by_side():
    """By threads of their own, in a program for any batch and in one for that batch; each image has its own answer."""
    installed("openvino")
    model = model_of("tome(r=2)")
    images = make_images(model.vit, 4)
    with torch.no_grad():
        expected = model(images).logits
        for threads, parts in ((2, 2), (3, 1), (8, 4)):
            for batch in (None, 4):
                session = model.runner("openvino", batch=batch, threads=threads, provenance=True)
                found = session.all(images)
                assert relative(found["logits"], expected) <= 1e-5 and found["owner"].shape[0] == 4
            assert engines.engine_of("openvino").parts(4, threads) == parts
        with pytest.raises(UserError, match="3 images: this program takes a batch of 4 equal parts"):
            session(images[:3])


def test_whole_numbers_that_an_engine_has_not_are_refused():
    """OpenVINO computes whole numbers in 32 bits; what ``random_plus`` draws for an image is a hash of 64."""
    installed("openvino")
    with pytest.raises(UserError, match="OpenVINO computes whole numbers in 32 bits"):
        model_of("random_plus(0.5)").runner("openvino")
    agrees(model_of("random(0.5)"), "openvino")


@torch.no_grad()
def test_a_program_for_the_batch_of_the_runner_and_one_for_any_other():
    model = model_of("evit(0.5)")
    deployed = model.deploy({"dtype": "fp32", "engine": "torch", "batch": 2})
    way = deployed._deployment.view(deployed)[1]
    for count, started in ((2, {True}), (4, {True}), (1, {True, False}), (5, {True, False})):  # 5: twice two, and one
        images = make_images(model.vit, count)
        assert relative(deployed(images).logits, model(images).logits) <= 1e-5
        assert way._sessions.keys() == started
    other = model.deploy({"dtype": "fp32", "engine": "torch", "batch": 2})
    for count in (1, 2):  # what runs any number runs two
        other(make_images(model.vit, count))
    assert other._deployment.view(other)[1]._sessions.keys() == {False}


@pytest.mark.parametrize("name", ["torch", "onnx", "openvino"])
def test_an_encoder_gives_its_features(name):
    """Also where an operator inside has the name of the output: rows are taken by ``torch.embedding``."""
    installed(name)
    model = AdaptiveViT(make_vit("vit", num_classes=0), "evit(0.5)").eval()
    session, images = model.runner(name, batch=2), make_images(model.vit, 2)
    assert session.outputs == ("embedding",)
    with torch.no_grad():
        assert relative(session(images), model(images).logits) <= 1e-5


def test_many_threads_at_once():
    installed("onnx")
    model = model_of("tome(r=2)")
    session = model.runner("onnx", threads=1)
    assert (session.precision, session.device, session.threads) == ("fp32", "cpu", 1)
    batches = [make_images(model.vit, 1 + i % 3, seed=i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(session, batches))
    with torch.no_grad():
        assert max(relative(f, model(b).logits) for f, b in zip(found, batches, strict=True)) <= 1e-5


def test_a_deployed_model_runs_in_its_engine_and_a_folder_says_so(tmp_path):
    import saccade

    model = AdaptiveViT(make_vit("vit"), "evit(0.5)").eval()
    images = make_images(model.vit, 3)
    deployed = model.deploy("torch")
    assert "by torch.export" in repr(deployed).split("(vit)")[0]
    with torch.no_grad():
        out = deployed(images)
        assert relative(out.logits, model(images).logits) <= 1e-5
        assert torch.equal(out.trace.macs(), model(images).trace.macs())
    model.vit.pretrained_cfg = {"architecture": "vit_tiny_patch16_224"}
    assert Runner.of(deployed.deployed.to_dict()) == Runner("fp32", "torch") == deployed.deployed
    assert saccade.AdaptiveViT is AdaptiveViT


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_not_installed_is_named_with_its_install_line(name, monkeypatch):
    module = engines.import_module(f"saccade.runners.engines.{name}")
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    if module.PACKAGES:
        with pytest.raises(UserError, match=rf"pip install 'saccade\[{name}\]'"):
            model_of("").runner(name)
    else:
        assert engines.missing(module) is None


def test_without_its_engine_a_deployed_model_runs_eagerly_and_says_so(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    model = model_of("evit(0.5)")
    images = make_images(model.vit, 2)
    with pytest.warns(RuntimeWarning, match=r"ONNX Runtime does not work here.*pip install"), torch.no_grad():
        assert torch.equal(model.deploy("onnx")(images).logits, model(images).logits)


def test_a_number_type_that_an_engine_does_not_have():
    installed("onnx")
    with pytest.raises(UserError, match="onnx does not run in bf16 on this machine: use fp32 or int8"):
        model_of("").runner("onnx", dtype="bf16")
    with pytest.raises(UserError, match="dtype 'int8' is not one of"):
        model_of("").runner("eager", dtype="int8")
    with pytest.raises(UserError, match="engine 'tensorrt' is not one of"):
        model_of("").runner("tensorrt")


def test_threads_of_onnx_runtime_leave_the_cores_to_others_between_calls(monkeypatch):
    installed("onnx")
    import onnxruntime

    told = []
    plain = onnxruntime.InferenceSession

    def opened(file, options, **more):
        told.append(options.get_session_config_entry("session.intra_op.allow_spinning"))
        return plain(file, options, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    model_of("").runner("onnx")
    assert told == ["0"]


def test_every_engine_is_a_module_with_the_names_of_the_protocol():
    for name in EXPORTED:
        module = engines.import_module(f"saccade.runners.engines.{name}")
        assert {"FILES", "PACKAGES", "EXTRA", "dtypes", "write", "open"} <= vars(module).keys()
    assert set(EXPORTED) | {"eager", "compile", "cudagraph"} == set(ENGINES)


def test_openvino_s_makers_are_told_nothing():
    """Its import, and its converter, would start a thread and a process that call a server: in a new process, none."""
    installed("openvino")
    code = (
        "import sys, threading; from saccade.runners.engines import openvino as engine; engine.library();"
        "print(sys.modules.get('openvino_telemetry'), len(threading.enumerate()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["None", "1"]


SIGNALLED = """
import signal, sys, threading
from oracles import make_images, make_vit
from saccade.model import AdaptiveViT

sessions = []

def begin():
    model = AdaptiveViT(make_vit("vit").eval())
    sessions.append(model.runner("openvino"))
    sessions[0](make_images(model.vit))

def elsewhere(what):
    thread = threading.Thread(target=what)
    thread.start(), thread.join()

begin() if sys.argv[1] == "here" else elsewhere(begin)
elsewhere(sessions.clear) if sys.argv[1] == "here" else sessions.clear()
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
signal.raise_signal(signal.SIGINT)
print("heard", len(heard))
"""


@pytest.mark.parametrize("first", ["here", pytest.param("elsewhere", marks=pytest.mark.slow)])
def test_a_signal_after_the_last_session(first):
    """OpenVINO gives a thread a stack for signals and takes it away in another: Ctrl-C then ended the process."""
    installed("openvino")
    path = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    told = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": path}}
    ran = subprocess.run([sys.executable, "-X", "faulthandler", "-c", SIGNALLED, first], **told)
    assert (ran.returncode, ran.stdout) == (0, "heard 1\n"), ran.stderr[-2000:]
