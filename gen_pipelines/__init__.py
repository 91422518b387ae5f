"""Every generative family as a Hugging Face style pipeline.

Importing this package imports no torch: every public name is resolved on first use (PEP 562).
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

# public name -> module, in the order of the layers (a module imports only from those above its own)
_EXPORTS: dict[str, str] = {
    "bundled_path": ".bundled",
    "LoadingError": ".hub.loading",
    "Parameterization": ".processes",
    "PATHS": ".processes",
    "SCHEDULERS": ".schedulers",
    "BridgedScheduler": ".schedulers",
    "ConsistencyScheduler": ".schedulers",
    "DDIMScheduler": ".schedulers",
    "DDIMInverseScheduler": ".schedulers",
    "DDPMScheduler": ".schedulers",
    "DPMSolverMultistepScheduler": ".schedulers",
    "EulerAncestralScheduler": ".schedulers",
    "EulerScheduler": ".schedulers",
    "FlowMatchEulerScheduler": ".schedulers",
    "FlowMatchHeunScheduler": ".schedulers",
    "HeunScheduler": ".schedulers",
    "RectifiedFlowScheduler": ".schedulers",
    "ScoreSDEScheduler": ".schedulers",
    "UniPCScheduler": ".schedulers",
    "fast_cpu_matmul": ".models.cpu_matmul",
    "GenerativeModel": ".models.base",
    "ADMUNet2DModel": ".models.denoisers.adm_unet",
    "DiTModel": ".models.denoisers.dit",
    "ADMClassifier": ".models.classifiers.adm_classifier",
    "VAEModel": ".models.autoencoders.vae",
    "VQVAEModel": ".models.autoencoders.vq_vae",
    "ScoreUNetModel": ".models.denoisers.score_unet",
    "EDM2UNetModel": ".models.denoisers.edm2_unet",
    "HDiTModel": ".models.denoisers.hdit",
    "KDiffusionUNetModel": ".models.denoisers.k_diffusion_unet",
    "PixelCNNPrior": ".models.priors.pixel_cnn",
    "PixelSNAILPrior": ".models.priors.pixel_snail",
    "TransformerPrior": ".models.priors.transformer",
    "OpenCLIPTextEncoder": ".models.text_encoders.open_clip",
    "OpenCLIPTokenizer": ".models.text_encoders.open_clip",
    "GlowModel": ".models.flows.glow",
    "NormalizingFlowModel": ".models.flows.base",
    "RealNVPModel": ".models.flows.realnvp",
    "LikelihoodResult": ".likelihood",
    "ConvClassifier": ".models.classifiers.conv_classifier",
    "DCGANDiscriminator": ".models.gans.dcgan",
    "DCGANGenerator": ".models.gans.dcgan",
    "ResNetDiscriminator": ".models.gans.resnet_gan",
    "ResNetGenerator": ".models.gans.resnet_gan",
    "StyleGAN1Generator": ".models.gans.stylegan1",
    "StyleGAN2Discriminator": ".models.gans.stylegan2",
    "StyleGAN2Generator": ".models.gans.stylegan2",
    "StyleGAN3Generator": ".models.gans.stylegan3",
    "GenerativePipeline": ".pipelines.base",
    "VAEPipeline": ".pipelines.vae",
    "VQVAEPipeline": ".pipelines.vq_vae",
    "ClassifierFreeGuidance": ".pipelines.guidance",
    "ClassifierGuidance": ".pipelines.guidance",
    "DiffusersGuidance": ".pipelines.guidance",
    "GuidanceInterval": ".pipelines.guidance",
    "GlowPipeline": ".pipelines.glow",
    "GANPipeline": ".pipelines.gan",
    "StyleGANPipeline": ".pipelines.stylegan",
    "DiffusionImagePipeline": ".pipelines.diffusion_image",
    "LatentTextToImagePipeline": ".pipelines.latent_text_to_image",
    "RePaint": ".pipelines.editing",
    "LatentImageToImagePipeline": ".pipelines.latent_image_to_image",
    "LatentInpaintPipeline": ".pipelines.latent_inpaint",
    "AutoPipeline": ".pipelines.auto",
    "AdversarialObjective": ".training.objectives.adversarial",
    "AutoencoderObjective": ".training.objectives.autoencoder",
    "ELBOObjective": ".training.objectives.elbo",
    "IWAEObjective": ".training.objectives.iwae",
    "VQObjective": ".training.objectives.vq",
    "PriorObjective": ".training.objectives.prior",
    "ConsistencyDistillation": ".training.objectives.consistency",
    "ConsistencyTraining": ".training.objectives.consistency",
    "MinibatchOTCoupling": ".training.objectives.coupling",
    "DenoisingObjective": ".training.objectives.denoising",
    "VariationalObjective": ".training.objectives.variational",
    "ReflowObjective": ".training.objectives.reflow",
    "LatentConsistencyDistillation": ".training.objectives.latent_consistency",
    "LikelihoodObjective": ".training.objectives.likelihood",
    "Trainer": ".training.trainer",
    "evaluate": ".evaluation.evaluate",
    "compare": ".evaluation.compare",
    "convert": ".conversion.base",
}

# diffusers looks for these on the library recorded in model_index.json when it decides how a component is loaded
_REEXPORTS: dict[str, str] = {
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
    "DiffusionPipeline": "diffusers",
    "PreTrainedModel": "transformers",
    "PreTrainedTokenizer": "transformers",
    "PreTrainedTokenizerFast": "transformers",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    elif name in _REEXPORTS:
        value = getattr(importlib.import_module(_REEXPORTS[name]), name)
    else:  # diffusers probes with getattr(library, name, None), so this must be an AttributeError
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
