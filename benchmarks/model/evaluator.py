"""Train the evaluator on real train pictures: drawing style, and pictures against their texts.

Half of them are seen as the autoencoder gives them back: every drawn picture has been through it.
"""

import json

import autoencoder
import data
import text
import torch
import training
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from redi.evaluator import Network, tokenize

CHECKPOINT = "evaluator.pt"
BATCH = 256


def loss(
    network: Network,
    images: Tensor,
    style: Tensor,
    ids: tuple[Tensor, Tensor],
    real: tuple[Tensor, Tensor],
    same: tuple[Tensor, Tensor],
) -> Tensor:
    """Cross-entropy of styles, and of which text (full prompts, bare captions) goes with which picture.

    `same[k][i, j]` is 1 where text j of kind k reads as text i, so that equal texts are no rivals.
    """
    features = network.image_features(images)
    value = functional.cross_entropy(network.style(features).float(), style, label_smoothing=0.05)
    pictures = functional.normalize(network.picture(features), dim=-1)
    for i, r, s in zip(ids, real, same, strict=True):
        logits = (network.scale.clamp_max(4.0).exp() * pictures @ network.text_features(i, r).T).float()
        target = s / s.sum(dim=1, keepdim=True)
        value = value + 0.25 * (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target))
    return value


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [0, 1] for training: flipped and moved; half turned and scaled; some blurred; half with a white box.

    A style must be told from how a thing is drawn, not from single pixels, which no autoencoder keeps.
    """
    x = 1.0 - (data.augment(images, generator) + 1.0) / 2.0  # ink on nothing, so that what comes in is white
    b, _, height, width = x.shape

    def spread(shape: tuple[int, ...], reach: float) -> Tensor:
        return (2.0 * torch.rand(shape, generator=generator) - 1.0) * reach

    some = (torch.rand(b, generator=generator) < 0.5).nonzero().flatten()
    angle, scale, aspect = (
        spread((len(some),), 0.17),
        spread((len(some),), 0.15).exp(),
        spread((len(some),), 0.08).exp(),
    )
    c, s, zero = angle.cos() * scale, angle.sin() * scale, torch.zeros(len(some))
    turn = torch.stack([c * aspect, -s, zero, s, c / aspect, zero], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(turn, list(x[some].shape), align_corners=False)
    x[some] = functional.grid_sample(x[some], grid, align_corners=False)

    blur = spread((b, 1, 1, 1), 0.7).clamp_min(0.0)
    x = x + blur * (functional.avg_pool2d(x, 3, 1, 1) - x)

    def inside(length: int) -> Tensor:
        size, start = (torch.randint(*r, (b, 1), generator=generator) for r in ((4, 13), (-4, 32)))
        at = torch.arange(length)
        return (at >= start) & (at < start + size)

    rows, columns = inside(height), inside(width)
    box = rows[:, None, :, None] & columns[:, None, None, :] & (torch.rand(b, 1, 1, 1, generator=generator) < 0.5)
    return 1.0 - x.masked_fill(box, 0.0)


@torch.no_grad()
def accuracy(network: Network, images: Tensor, style: Tensor) -> float:
    pixels = images.float() / 255.0
    found = torch.cat([network.style(network.image_features(b)) for b in pixels.split(256)])
    return float((found.argmax(dim=1) == style).float().mean())


def padded(tokenizer: object, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask at one fixed length, so that the network compiles once."""
    ids, real = tokenize(tokenizer, texts)
    missing = text.LENGTH - ids.shape[1]
    return functional.pad(ids, (0, missing)), functional.pad(real, (0, missing))


def main() -> None:
    args = training.parser(__doc__, minutes=60.0).parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    train, val = data.load(args.data, "train"), data.load(args.data, "val")
    styles = sorted(set(train.styles))
    style, val_style = (torch.tensor([styles.index(s) for s in p.styles]) for p in (train, val))
    tokenizer = text.CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    full, bare = padded(tokenizer, train.prompts()), padded(tokenizer, train.captions)
    names = sorted(set(train.captions))
    caption = torch.tensor([names.index(c) for c in train.captions])
    pair = caption * len(styles) + style

    vae = AutoencoderKL.from_pretrained(args.out / autoencoder.WHITENED)
    softened = autoencoder.given_back(vae, train.images, generator)
    views = torch.stack([train.images, ((softened + 1.0) * 127.5).round().byte()])
    network = Network(len(tokenizer), len(styles)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    run = training.Run(network, optimizer, generator, args.out / CHECKPOINT, args, peak=2e-3, decay=0.998)
    compiled = training.compiled(loss, network)
    while run.unfinished():
        rows = torch.randint(0, len(train), (BATCH,), generator=generator)
        images = distort(views[torch.randint(0, 2, (BATCH,), generator=generator), rows], generator)
        same = tuple((k[rows, None] == k[None, rows]).float() for k in (pair, caption))
        value = compiled(
            images.to(memory_format=torch.channels_last),
            style[rows],
            (full[0][rows], bare[0][rows]),
            (full[1][rows], bare[1][rows]),
            same,
        )
        run.learn(value)
        if run.step % 500 == 0:
            run.log(style_accuracy=accuracy(run.average.module, val.images, val_style))
    run.log(style_accuracy=accuracy(run.average.module, val.images, val_style))
    folder = args.out / "evaluator"
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in run.average.module.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    config = {"vocabulary": len(tokenizer), "styles": styles}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
