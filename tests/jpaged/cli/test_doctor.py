"""`jpaged doctor`."""

import json

import pytest

import jpaged
from jpaged import cli, doctor
from jpaged.pallas_kernels import mosaic_tpu


def test_doctor_reports_this_machine(capsys):
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["problems"]) == (0, [])
    assert report["versions"]["jpaged"] == jpaged.__version__
    assert report["devices"]
    assert report["choices"].keys() == {"device", "dtype", "kernels", "block pool", "budgets"}
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("versions", "devices", "default model", "compilation cache", "would be used"):
        assert word in text


def test_doctor_names_the_kernels_of_a_tpu(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "device_reasons", lambda: ())
    kernels = doctor._kernels()
    assert kernels["use"] == "mosaic_tpu: paged_attention, write_kv, copy_blocks"
    assert "head_dim 64, 128, 256" in kernels["why"]


def test_doctor_hints_at_the_missing_cuda_plugin(monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_gpus", lambda: ["NVIDIA H100, 9.0, 81559 MiB"])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    report = {"hints": [], "backend": "cpu", "compilation_cache": None}
    report["nvidia_driver"] = doctor._nvidia_gpus()
    doctor._add_hints(report)
    assert 'JAX has no CUDA plugin: pip install "jpaged[cuda]"' in report["hints"][0]


def test_doctor_survives_a_broken_jax(monkeypatch, capsys):
    def broken(report):
        raise RuntimeError("Unable to initialize backend\nlong story")

    monkeypatch.setattr(doctor, "_examine_jax", broken)
    assert cli.main(["doctor"]) == 1
    assert "- JAX cannot start: Unable to initialize backend\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (2048, "2.0 KiB"), (3 << 29, "1.5 GiB")]
)
def test_sizes_are_readable(num_bytes, text):
    assert doctor._size(num_bytes) == text
