"""Train the autoencoder: 32 x 32 pictures to 8 x 8 latents and back.

`whiten` then makes the latents what a diffusion model wants, without changing a picture.
"""

import data
import torch
import training
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

CHECKPOINT = "autoencoder.pt"
WHITENED = "vae"  # the folder of the autoencoder with whitened latents
CHANNELS = (24, 48, 96)
KL_WEIGHT = 1e-4  # of the mean over latent numbers
LOG_VARIANCE = -6.0  # of the untrained posterior: from 0 the decoder never learns to look at it
BATCH = 64


def build() -> AutoencoderKL:
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=8,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        model.quant_conv.bias[model.config.latent_channels :] = LOG_VARIANCE
    return model


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss(model: AutoencoderKL, images: Tensor, noise: Tensor) -> Tensor:
    """L1 and squared error of pixels, L1 of neighbours' differences, a little KL to N(0, 1)."""
    mean, log_variance = model.quant_conv(model.encoder(images)).chunk(2, dim=1)
    log_variance = log_variance.float().clamp(-30.0, 20.0)
    latents = mean + torch.exp(0.5 * log_variance) * noise
    decoded = model.decoder(model.post_quant_conv(latents)).float()
    kl = 0.5 * (mean.float().square() + log_variance.exp() - 1.0 - log_variance).mean()
    edge = sum(functional.l1_loss(a, b) for a, b in zip(edges(decoded), edges(images), strict=True))
    return (
        functional.l1_loss(decoded, images) + 2.0 * functional.mse_loss(decoded, images) + 0.5 * edge + KL_WEIGHT * kl
    )


@torch.no_grad()
def given_back(model: AutoencoderKL, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """uint8 pictures as decoded from their mean latents, in [-1, 1].

    With a generator the latents of each are moved first, by up to 0.4 of their deviation.
    """
    parts: list[Tensor] = []
    for batch in images.split(256):
        latents = model.encode(data.signed(batch)).latent_dist.mean
        if generator is not None:
            reach = 0.4 * torch.rand(len(latents), 1, 1, 1, generator=generator)
            latents = latents + reach * torch.randn(latents.shape, generator=generator)
        parts.append(model.decode(latents).sample.clamp(-1.0, 1.0))
    return torch.cat(parts)


def psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Mean over pictures of the peak signal to noise ratio of mean latents decoded, in dB."""
    error = (given_back(model, images) - data.signed(images)).square().mean(dim=(1, 2, 3)) / 4.0
    return float((-10.0 * error.clamp_min(1e-10).log10()).mean())


@torch.no_grad()
def whiten(model: AutoencoderKL, mean: Tensor, deviation: Tensor) -> None:
    """Fold a shift and a scale per latent channel into the two 1 x 1 convolutions.

    Latents then have zero mean and unit deviation and need no scaling factor; pictures decoded
    from them are the same as before.
    """
    n = len(mean)
    quant, post = model.quant_conv, model.post_quant_conv
    quant.bias[:n] -= mean
    quant.bias[:n] /= deviation
    quant.weight[:n] /= deviation[:, None, None, None]
    quant.bias[n:] -= 2.0 * deviation.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight *= deviation[None, :, None, None]


def main() -> None:
    args = training.parser(__doc__, minutes=15.0).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train, val = data.load(args.data, "train"), data.load(args.data, "val")

    model = training.safe_upsampling(build()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-4)
    run = training.Run(model, optimizer, generator, args.out / CHECKPOINT, args, peak=2e-3)
    compiled = training.compiled(loss, model)
    while run.unfinished():
        rows = torch.randint(0, len(train), (BATCH,), generator=generator)
        images = data.augment(train.images[rows], generator).to(memory_format=torch.channels_last)
        noise = torch.randn(BATCH, 8, 8, 8, generator=generator)
        run.learn(compiled(images, noise))
        if run.step % 500 == 0:
            run.log(psnr=psnr(run.average.module, val.images[:256]))
    run.log(psnr=psnr(run.average.module, val.images))


if __name__ == "__main__":
    main()
