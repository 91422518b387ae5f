"""A folder with the layout of pythae's: model.pt, model_config.json, environment.json."""

import json

import torch

OPTIONS = {}
VAE = {"name": "VAEConfig", "input_dim": [1, 4, 6], "latent_dim": 3, "uses_default_encoder": True, "uses_default_decoder": True,
       "reconstruction_loss": "mse"}  # fmt: skip
VQVAE = {"name": "VQVAEConfig", "input_dim": [3, 4, 4], "latent_dim": 5, "uses_default_encoder": True, "uses_default_decoder": True,
         "commitment_loss_factor": 0.5, "quantization_loss_factor": 1.0, "num_embeddings": 4, "use_ema": False, "decay": 0.9}  # fmt: skip


def state(config, seed=0):
    generator, found = torch.Generator().manual_seed(seed), {}
    values, latents = torch.tensor(config["input_dim"]).prod().item(), config["latent_dim"]
    vq = config["name"] == "VQVAEConfig"
    heads = ["encoder.embedding"] + ([] if vq else ["encoder.log_var"])
    sizes = {"encoder.layers.0.0": (512, values), **dict.fromkeys(heads, (latents, 512)), "decoder.layers.0.0": (512, latents),
             "decoder.layers.1.0": (values, 512)}  # fmt: skip
    for name, (outputs, inputs) in sizes.items():
        found[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        found[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    if vq:
        book = torch.randn(config["num_embeddings"], 1, generator=generator)
        ema = {"cluster_size": torch.ones(len(book)), "ema_embed": book.clone(), "embeddings": book}
        found |= {f"quantizer.{k}": v for k, v in (ema if config["use_ema"] else {"embeddings.weight": book}).items()}
    return found


def write(folder, config=VAE):
    source = folder / "final_model"
    source.mkdir(parents=True)
    torch.save({"model_state_dict": state(config)}, source / "model.pt")
    (source / "model_config.json").write_text(json.dumps(config))
    (source / "environment.json").write_text(json.dumps({"name": "EnvironmentConfig", "python_version": "3.8"}))
    return source
