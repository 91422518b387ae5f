"""Converting takes about the checkpoint's size in memory, whatever the container."""

import pickle
import subprocess
import sys

import pytest
import torch

CODE = """
import sys
from gen_pipelines.conversion import convert
small, to, *sources = sys.argv[1:]
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
convert(small, to + "/small")  # imports what is needed
for i, source in enumerate(sources):
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark begins anew
    before = status("VmRSS")
    convert(source, f"{to}/{i}")
    print(status("VmHWM") - before)
"""


@pytest.mark.slow  # starts a process, writes 300 MB
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_the_peak_is_near_the_size(tmp_path):
    from conversion import fakes
    from conversion.checkpoints import rosinality_stylegan2, stylegan2_ada

    from gen_pipelines.conversion import export_state_dict

    wide = {"sample_size": 32, "z_dim": 512, "w_dim": 512, "channel_base": 2**14, "channel_max": 512}
    model = stylegan2_ada.StyleGAN2Generator(**wide)
    state, _ = export_state_dict(model, "rosinality_stylegan2")
    sources = [tmp_path / name for name in ("zip.pt", "legacy.pt", "pickle.pkl")]
    for source in sources[:2]:
        new = source.stem == "zip"
        torch.save({"g_ema": state, "latent_avg": torch.zeros(1, 512)}, source, _use_new_zipfile_serialization=new)
    kwargs = {"z_dim": 512, "c_dim": 0, "w_dim": 512, "img_resolution": 32, "img_channels": 3}
    kwargs["synthesis_kwargs"] = {"channel_base": 2**14}
    with fakes.modules(**fakes.NVIDIA):
        record = fakes.module_record(stylegan2_ada.with_filters(model), "Generator", kwargs, {"mapping": {"w_avg_beta": 0.998}})
        sources[2].write_bytes(pickle.dumps({"G_ema": record}))
    words = [sys.executable, "-c", CODE, rosinality_stylegan2.write(tmp_path), tmp_path / "out", *sources]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for source, line in zip(sources, done.stdout.split(), strict=True):
        size = source.stat().st_size
        assert size > 60e6 and int(line) < 1.3 * size, (source.stem, size, line)
