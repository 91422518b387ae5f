"""Converting takes about the checkpoint's size in memory, whatever the container."""

import pickle
import subprocess
import sys

import pytest
import torch

CODE = """
import sys
import gen_pipelines.conversion.rosinality_stylegan2, gen_pipelines.conversion.stylegan2_ada
from gen_pipelines.conversion import convert
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
convert(sys.argv[1], sys.argv[3])
before = peak()
convert(sys.argv[2], sys.argv[4])
print(peak() - before)
"""


@pytest.mark.slow  # starts a process, writes 2 x 100 MB
@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_the_peak_is_near_the_size(container, tmp_path):
    from conversion import fakes
    from conversion.checkpoints import rosinality_stylegan2, stylegan2_ada

    small = rosinality_stylegan2.write(tmp_path)
    wide = {"sample_size": 32, "z_dim": 512, "w_dim": 512, "channel_base": 2**14, "channel_max": 512}
    if container == "pickle":
        config = {**wide, "num_mapping_layers": 8}
        model = stylegan2_ada.StyleGAN2Generator(**config)
        kwargs = {"z_dim": 512, "c_dim": 0, "w_dim": 512, "img_resolution": 32, "img_channels": 3}
        kwargs["synthesis_kwargs"] = {"channel_base": 2**14}
        with fakes.modules(**fakes.NVIDIA):
            record = fakes.module_record(stylegan2_ada.with_filters(model), "Generator", kwargs, {"mapping": {"w_avg_beta": 0.998}})
            (tmp_path / "large.pkl").write_bytes(pickle.dumps({"G_ema": record}))
        large = tmp_path / "large.pkl"
    else:
        from gen_pipelines.conversion import export_state_dict

        state, _ = export_state_dict(stylegan2_ada.StyleGAN2Generator(**wide), "rosinality_stylegan2")
        large = tmp_path / "large.pt"
        torch.save({"g_ema": state, "latent_avg": torch.zeros(1, 512)}, large, _use_new_zipfile_serialization=container == "zip")
    size = large.stat().st_size
    words = [sys.executable, "-c", CODE, str(small), str(large), str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert size > 60e6 and int(done.stdout.split()[-1]) < 1.3 * size, (size, done.stdout)
