"""Random-weight pipelines of every class that the matrix runs over, each a fraction of a second to make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import seeded, tiny_pipeline, tiny_text_encoder, tiny_tokenizer, tiny_vae

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-:"
_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def make(name: str) -> Any:
    """A seeded pipeline in evaluation mode, without a progress bar."""
    with seeded(0):
        pipe = _MAKERS[name]()
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    tokenizer = _letters()
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 1, "num_heads": 4, "vocab_size": len(tokenizer)}
    return tokenizer, _louder(T5EncoderModel(T5Config(**settings)))


def _letters() -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((c, -3.0) for c in _LETTERS)], extra_ids=0, model_max_length=64)


def _louder(module: Any, gain: float = 3.0) -> Any:
    """Prompts far enough apart that pictures of different prompts clearly differ."""
    for name, weight in module.named_parameters():
        if weight.ndim == 2 and ("embed" in name or "shared" in name):
            weight.data.mul_(gain)
    return module


def _projecting(tokenizer: Any, size: int = 32) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _louder(CLIPTextModelWithProjection(config), 10.0)


def _sdxl() -> Any:
    tokenizer = tiny_tokenizer()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 32,
        attention_head_dim=8,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(4, 8, 2),
        text_encoder=tiny_text_encoder(tokenizer, layers=2),
        text_encoder_2=_projecting(tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**_SD),
        add_watermarker=False,
    )


def _sd3() -> Any:
    tokenizer, (tokenizer_3, text_encoder_3) = tiny_tokenizer(), _t5()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=16,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(4, 8, 2, shift_factor=0.06),
        text_encoder=_projecting(tokenizer, 16),
        tokenizer=tokenizer,
        text_encoder_2=_projecting(tokenizer, 16),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


def _flux() -> Any:
    tokenizer, (tokenizer_2, text_encoder_2) = tiny_tokenizer(), _t5()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(4, 8, 2, shift_factor=0.06),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def _pixart() -> Any:
    tokenizer, text_encoder = _t5()
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=tiny_vae(4, 8, 2),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=32,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _sana() -> Any:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_LETTERS, *_LETTERS[:26].upper()]
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=_louder(
            Gemma2Model(
                Gemma2Config(
                    head_dim=16,
                    hidden_size=8,
                    intermediate_size=64,
                    num_attention_heads=2,
                    num_hidden_layers=1,
                    num_key_value_heads=2,
                    vocab_size=len(tokenizer),
                    attn_implementation="eager",
                )
            ),
            20.0,
        ),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=16,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _wan() -> Any:
    tokenizer = _letters()
    config = UMT5Config(d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, vocab_size=len(tokenizer))
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=_louder(UMT5EncoderModel(config)),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        transformer=diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _animatediff() -> Any:
    pipe = tiny_pipeline()
    unet = diffusers.UNet2DConditionModel.from_config(pipe.unet.config)
    return diffusers.AnimateDiffPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=unet,
        motion_adapter=diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
        ),
        scheduler=diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False),
    )


def _form(base: str, form: str) -> Any:
    """The parts of a text-to-image pipeline in another class of its family."""
    cls = getattr(diffusers, f"{base}{form}Pipeline")
    parts = _MAKERS[base]().components
    if form == "ControlNet":
        parts["controlnet"] = diffusers.ControlNetModel.from_unet(
            parts["unet"], conditioning_channels=3, conditioning_embedding_out_channels=(8, 8)
        )
        for weight in parts["controlnet"].parameters():
            if not weight.detach().any():  # it begins as no control at all
                torch.nn.init.normal_(weight, std=0.05)
    parts |= {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    parts |= {"requires_safety_checker": False, "add_watermarker": False}
    wanted = inspect.signature(cls.__init__).parameters
    return cls(**{name: part for name, part in parts.items() if name in wanted})


_FORMS = {
    "StableDiffusion": ("Img2Img", "Inpaint", "ControlNet"),
    "StableDiffusionXL": ("Img2Img", "Inpaint", "ControlNet"),
    "StableDiffusion3": ("Img2Img",),
    "Flux": ("Img2Img", "Inpaint"),
}
_MAKERS: dict[str, Callable[[], Any]] = {
    "StableDiffusion": tiny_pipeline,
    "StableDiffusionXL": _sdxl,
    "StableDiffusion3": _sd3,
    "Flux": _flux,
    "PixArtSigma": _pixart,
    "Sana": _sana,
    "Wan": _wan,
    "AnimateDiff": _animatediff,
    **{base + form: partial(_form, base, form) for base, forms in _FORMS.items() for form in forms},
}
