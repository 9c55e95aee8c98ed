"""The environment stamp: complete, plain data, and it warns of lowered precision."""

import dataclasses
import json

import pytest
import torch

from healpass.environment import VARIABLES, Gpu, collect


@pytest.fixture
def found():
    return collect()


def test_to_dict_is_plain_data_with_every_field(found):
    data = json.loads(json.dumps(found.to_dict()))
    assert set(data) == {field.name for field in dataclasses.fields(found)}
    assert data["packages"]["torch"] == torch.__version__
    assert data["threads"] == torch.get_num_threads()


def test_it_cannot_be_changed(found):
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.threads = 3


def test_only_variables_that_are_set_are_listed(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert collect().variables == {"MKL_CBWR": "COMPATIBLE"}


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setattr("healpass.environment.PACKAGES", ("torch", "no-such-package"))
    assert collect().packages == {"torch": torch.__version__, "no-such-package": None}


def test_the_default_flags_give_no_warning_on_cpu(found):
    flags = dict.fromkeys(found.precision_flags, "none")
    assert dataclasses.replace(found, gpus=(), precision_flags=flags, variables={}).warnings == ()


@pytest.mark.parametrize("flag", ["backends", "backends.cuda.matmul", "backends.mkldnn.matmul"])
@pytest.mark.parametrize("value", ["tf32", "bf16"])
def test_a_lowered_flag_is_a_warning_where_it_matters(found, flag, value):
    path = f"torch.{flag}.fp32_precision"
    gpu = Gpu("some GPU", "9.0", 80.0, 132)
    lowered = dataclasses.replace(found, gpus=(gpu,), precision_flags={path: value}, variables={})
    (warning,) = lowered.warnings
    assert warning.startswith(f"{path}={value}")
    no_gpu = dataclasses.replace(lowered, gpus=())
    assert len(no_gpu.warnings) == ("cuda" not in flag)


def test_the_override_variable_is_a_warning(found):
    forced = dataclasses.replace(
        found, precision_flags={}, variables={"NVIDIA_TF32_OVERRIDE": "1"}
    )
    assert "TF32" in forced.warnings[0]
    off = dataclasses.replace(forced, variables={"NVIDIA_TF32_OVERRIDE": "0"})
    assert off.warnings == ()


def test_a_gpu_is_described(monkeypatch):
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "H100", 9, 0, 80 * 2**30, 132

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert collect().gpus == (Gpu("H100", "9.0", 80.0, 132),)
