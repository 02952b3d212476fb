"""Train the evaluator on real train pictures: drawing style, and pictures against their texts."""

import json
import math

import data
import text
import torch
import training
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
    args = training.parser(__doc__, minutes=10.0).parse_args()
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

    network = Network(len(tokenizer), len(styles)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    run = training.Run(
        network, optimizer, generator, args.out / CHECKPOINT, args, peak=2e-3, decay=0.998, clip=math.inf
    )
    compiled = training.compiled(loss, network)
    while run.unfinished():
        rows = torch.randint(0, len(train), (BATCH,), generator=generator)
        images = (data.augment(train.images[rows], generator) + 1.0) / 2.0
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
