"""Train the denoiser and the text encoder together, on latents made once by the autoencoder.

Stable Diffusion's recipe in miniature: its noise schedule, cross-attention to text, captions
dropped at random for classifier-free guidance, and an average of the weights for sampling.
"""

from pathlib import Path

import autoencoder
import data
import text
import torch
import training
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTokenizer

CHECKPOINT = "diffusion.pt"
BATCH = 128
STYLE_LEFT_OUT = 0.25  # share of the captions shown without their style
CAPTION_LEFT_OUT = 0.1  # share shown as the empty text, the unconditional half of guidance
SNR_CAP = 5.0  # soft min-SNR: weight on the picture's error never above this (arXiv:2303.09556)
SCHEDULE = {  # Stable Diffusion's, but for the prediction, where v serves few steps better
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "steps_offset": 1,
}


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(80, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text.HIDDEN,
        attention_head_dim=5,  # the number of heads, as diffusers reads it
        norm_num_groups=16,
    )
    # Each residual branch starts at zero, so the untrained network is nearly the identity.
    for name, module in unet.named_modules():
        last = name.endswith((".conv2", ".proj_out", ".to_out.0", ".ff.net.2"))
        if last or name == "conv_out":
            for weight in module.parameters():
                nn.init.zeros_(weight)
    return unet


class Denoiser(nn.Module):
    """The two networks that learn here, as one module for the optimizer and the average."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = build_unet()
        self.encoder = text.build_encoder(tokenizer)
        # Softmax of a product, as written: torch 2.13's fused attention took two fifths of a CPU's step, backwards.
        self.unet.set_attn_processor(AttnProcessor())
        self.encoder.set_attn_implementation("eager")

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """The prediction of v. Shape: that of `noisy`."""
        hidden = self.encoder(ids)[0]
        return self.unet(noisy, timestep, hidden, return_dict=False)[0]


def loss(model: nn.Module, noisy: Tensor, timestep: Tensor, ids: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error of v = sqrt(a) noise - sqrt(1 - a) latents (arXiv:2202.00512)."""
    error = (model(noisy, timestep, ids).float() - target).square().mean(dim=(1, 2, 3))
    return (weight * error).mean()


@torch.no_grad()
def prepare(out: Path, pictures: data.Pictures) -> tuple[Tensor, Tensor]:
    """Whitened posterior means and deviations, made once and kept beside the whitened vae."""
    path = out / "latents.pt"
    if not path.exists():
        vae = autoencoder.build()
        vae.load_state_dict(training.restore(out / autoencoder.CHECKPOINT)["average"])
        mean, deviation = posterior(vae, pictures.images)
        autoencoder.whiten(vae, mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3)))
        mean, deviation = posterior(vae, pictures.images)
        vae.save_pretrained(out / autoencoder.WHITENED)
        training.save(path, {"mean": mean, "deviation": deviation})
    state = training.restore(path)
    return state["mean"], state["deviation"]


def posterior(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    means: list[Tensor] = []
    deviations: list[Tensor] = []
    for batch in images.split(256):
        found = vae.encode(data.signed(batch)).latent_dist
        means.append(found.mean)
        deviations.append(found.std)
    return torch.cat(means), torch.cat(deviations)


def main() -> None:
    args = training.parser(__doc__, minutes=90.0).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    pictures = data.load(args.data, "train")
    mean, deviation = prepare(args.out, pictures)
    known = sorted(set(pictures.captions))
    folder = args.out / "tokenizer"
    if args.resume:  # learning breaks ties by chance, and the weights know the ids of the first time
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    else:
        tokenizer = text.train_tokenizer(known + pictures.prompts(), folder)
    with_style = text.tokens(tokenizer, pictures.prompts())
    without_style = text.tokens(tokenizer, pictures.captions)
    nothing = text.tokens(tokenizer, [""])

    alphas = DDPMScheduler(**SCHEDULE).alphas_cumprod
    snr = alphas / (1.0 - alphas)
    weights = (snr + 1.0).clamp_max(SNR_CAP) / (snr + 1.0)

    model = training.safe_upsampling(Denoiser(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    run = training.Run(model, optimizer, generator, args.out / CHECKPOINT, args, peak=1e-3, warmup=300)
    compiled = training.compiled(loss, model)

    def batch() -> tuple[Tensor, ...]:
        rows = torch.randint(0, len(pictures), (BATCH,), generator=generator)
        latents = mean[rows] + deviation[rows] * torch.randn(mean[rows].shape, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        # One time in each BATCH-th of the schedule: less variance than independent draws.
        spread = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        timestep = (spread * len(alphas)).long().clamp_max(len(alphas) - 1)
        a = alphas[timestep, None, None, None]
        noisy = a.sqrt() * latents + (1.0 - a).sqrt() * noise
        target = a.sqrt() * noise - (1.0 - a).sqrt() * latents
        draw = torch.rand(2, BATCH, 1, generator=generator)
        ids = torch.where(draw[0] < STYLE_LEFT_OUT, without_style[rows], with_style[rows])
        ids = torch.where(draw[1] < CAPTION_LEFT_OUT, nothing, ids)
        return noisy, timestep, ids, target, weights[timestep]

    while run.unfinished():
        run.learn(compiled(*batch()))


if __name__ == "__main__":
    main()
