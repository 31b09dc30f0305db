"""Images and prompts -> cached latents and embeddings, as --data and --prompts take them.

    python -m kit.encode --data IMAGES --out LATENTS
        latents and labels
    python -m kit.encode --data IMAGES --prompts captions.jsonl --out LATENTS
        latents and embedded captions
    python -m kit.encode --prompts prompts.txt --out PROMPTS
        embeddings alone, for sample.py --prompts
    torchrun --nproc_per_node 8 -m kit.encode --data IMAGES --out LATENTS
        the same cache, made by eight processes

`python kit/encode.py` starts the same command. A command that was killed, at any point, continues
when it is repeated. When the cache is finished already, the command says so.

captions.jsonl has a line {"file": "below/the/folder.png", "text": "the caption"} for every image.
kit.data.Latents tells the format of the cache. prompts.json beside it names the rows of
embeddings.npy.

The autoencoder needs diffusers, the text encoder transformers: pip install diffusers transformers.
"""
# Only functions of this file import diffusers and transformers, which are optional.
import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

if not __package__:  # started as `python kit/encode.py`: what we import lies in the root, not here
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from fid import center_crop  # noqa: E402
from kit import sampling  # noqa: E402
from kit.cache import write_pieces  # noqa: E402
from kit.cli import (  # noqa: E402
    UserError,
    check_positive,
    check_workers,
    flag,
    make_parser,
    run_script,
    say,
)
from kit.data import (  # noqa: E402
    ImageFolder,
    Latents,
    labels_of,
    load,
    start_worker,
    to_float,
    to_uint8,
    unwrap_worker_errors,
)
from kit.download import local_first  # noqa: E402
from kit.processes import Processes, progress_bar, save_array, write_text  # noqa: E402

# ---- The models --------------------------------------------------------------------------------


def load_vae(proc, name, flag="--vae"):
    """diffusers' AutoencoderKL or VQModel, alone or inside a pipeline, on the device and frozen.

    name: a folder or a name on huggingface.co, as `flag` gives it. Raises UserError.
    """
    def load_from(place):
        import diffusers
        config = diffusers.AutoencoderKL.load_config(name, subfolder=place)
        kind = config["_class_name"]
        if kind not in ("AutoencoderKL", "VQModel"):
            raise ValueError(f"it is a {kind}, not an AutoencoderKL or VQModel")
        model = getattr(diffusers, kind)
        return model.from_pretrained(name, subfolder=place, output_loading_info=True)

    places = ("", "vqvae", "vae")
    return local_first(lambda: _load_extra(proc, flag, name, places, load_from))


def load_text_encoder(proc, name, flag="--text-encoder"):
    """transformers' CLIP text model, alone or inside a Stable Diffusion pipeline, on the device and
    frozen, with its tokenizer as .tokenizer.

    name: a folder or a name on huggingface.co, as `flag` gives it. Raises UserError.
    """
    def load_from(place):
        import transformers
        net, report = transformers.CLIPTextModel.from_pretrained(name, subfolder=place,
                                                                 output_loading_info=True)
        beside = "tokenizer" if place else ""
        net.tokenizer = transformers.CLIPTokenizer.from_pretrained(name, subfolder=beside)
        return net, report

    places = ("", "text_encoder")
    return local_first(lambda: _load_extra(proc, flag, name, places, load_from))


def _load_extra(proc, flag, name, places, load_from):
    """A network of an optional package, on the device and frozen. Raises UserError.

    places: the sub-folders in which model `name` may lie. load_from(place) -> (network, report).
    """
    if not proc.is_main:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.update(DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
    found = [place for place in places if (Path(name) / place).is_dir()]
    for place in found[-1:] or places:
        try:
            net, report = load_from(place)
            if report["missing_keys"]:
                first = ", ".join(sorted(report["missing_keys"])[:3])
                raise ValueError(f"it lacks weights: {first}")
            return net.to(proc.device, torch.float32).eval().requires_grad_(False)
        except ImportError as e:
            raise UserError(f"{flag} {name} needs an optional extra ({str(e).splitlines()[0]}): "
                            "pip install diffusers transformers")
        except Exception as e:  # huggingface_hub's, json's, safetensors'
            reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
    raise UserError(f"{flag} {name}: cannot be loaded ({reason}); name a folder, or a model of "
                    "huggingface.co that this machine can reach")


def default_scale(vae):
    """By what latents of this autoencoder are multiplied: its own factor; 1 for a VQModel, as in
    latent diffusion."""
    if hasattr(vae.config, "scaling_factor") and type(vae).__name__ == "AutoencoderKL":
        return vae.config.scaling_factor
    return 1.0


def encode_images(vae, x):
    """Images (B, 3, H, W) in [-1, 1] -> their latents, not multiplied by a scale.

    (B, 2, C, h, w), mean and standard deviation of the posterior; of a VQModel (B, 1, C, h, w), the
    latents before they are quantised.
    """
    out = vae.encode(x)
    if hasattr(out, "latent_dist"):
        return torch.stack([out.latent_dist.mean, out.latent_dist.std], 1)
    return out.latents[:, None]


@torch.no_grad()
def decode_images(vae, z, batch=16):
    """Latents (N, C, h, w), divided by their scale -> images (N, 3, H, W) uint8. Raises UserError.

    batch: how many images are decoded at once.
    """
    channels = vae.config.latent_channels
    if channels != z.shape[1]:
        raise UserError(f"--decode: this autoencoder's latents have {channels} channels, "
                        f"the model's {z.shape[1]}")
    return torch.cat([to_uint8(vae.decode(part).sample) for part in z.split(batch)])


def encode_prompts(net, texts):
    """B strings -> (B, T, D), the text encoder's last hidden state.

    Texts are padded and cut to the encoder's T = 77 tokens, without a mask, as in Stable Diffusion
    v1.
    """
    tokens = net.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt",
                           max_length=net.config.max_position_embeddings)
    return net(tokens.input_ids.to(net.device)).last_hidden_state


# ---- What is encoded ---------------------------------------------------------------------------


@dataclass
class Source:
    """Images, prompts or both, as --data and --prompts name them."""

    data: object  # a pixel data set, or None
    size: int     # to which the images are cropped and scaled, or None
    workers: int  # processes that read them
    names: list   # of the images
    texts: list   # the prompts
    labels: list  # for every image: its class, or the index of its caption in texts


class Crops:
    """Item i is image i of a pixel data set, (3, size, size) uint8."""

    def __init__(self, data, size):
        self.data = data
        self.size = size

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if isinstance(self.data, ImageFolder):
            return self.data[(i, 0)][0]
        pixels = self.data.x[i].expand(3, -1, -1).permute(1, 2, 0).numpy()
        return torch.from_numpy(center_crop(Image.fromarray(pixels), self.size)).permute(2, 0, 1)


def open_source(args):
    """The Source that the arguments name. Raises UserError."""
    if not args.data and not args.prompts:
        raise UserError("encode what? Name images with --data, prompts with --prompts, or both")
    data = load(args.data, args.image_size, workers=args.workers) if args.data else None
    if isinstance(data, Latents):
        raise UserError(f"--data {args.data} holds latents already")
    size = None
    names = []
    if data:
        size = args.image_size or data.shape[-1]
        names = names_of(data)
    if args.prompts:
        texts, labels = read_prompts(args.prompts, data)
    else:
        texts, labels = [], labels_of(data).tolist()
    workers = min(4, os.cpu_count()) if args.workers is None else args.workers
    return Source(data, size, workers, names, texts, labels)


def names_of(data):
    """What the images of a data set are called in prompts and caches."""
    if isinstance(data, ImageFolder):
        return [file.relative_to(data.name).as_posix() for file, _ in data.files]
    return [f"{data.name}/{i}" for i in range(len(data))]


def read_prompts(path, data=None):
    """--prompts FILE -> (texts to embed, for every image of data the index of its text).

    FILE.jsonl has a line {"file": image's name below the folder, "text": its caption} for every
    image. Equal captions are embedded once. Without images: the texts of these lines, or the lines
    of another file, in their order. Raises UserError.
    """
    is_table = Path(path).suffix == ".jsonl"
    try:
        texts, files = _read_lines(path, is_table, bool(data))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--prompts {path}: cannot be read ({e}); want one prompt per line, or in "
                        'a .jsonl file lines of {"file": ..., "text": ...}')
    if not texts:
        raise UserError(f"--prompts {path}: holds no prompts")
    if not data:
        return texts, []
    if not is_table or not isinstance(data, ImageFolder):
        raise UserError(f"--prompts {path}: captions go with a folder of images, and stand in a "
                        '.jsonl file with lines of {"file": ..., "text": ...}')
    caption_of = dict(zip(files, texts))
    if len(caption_of) < len(files):
        raise UserError(f"--prompts {path}: names a file twice; an image has one caption")
    return _match_captions(path, caption_of, names_of(data))


def _read_lines(path, is_table, want_files):
    """The texts in a file of prompts, and where they are wanted the files that its lines name."""
    lines = [line for line in Path(path).read_text("utf-8-sig").split("\n") if line.strip()]
    if not is_table:
        return lines, []
    entries = [json.loads(line) for line in lines]
    texts = [str(entry["text"]) for entry in entries]
    return texts, [entry["file"] for entry in entries] if want_files else []


def _match_captions(path, caption_of, names):
    """(The different captions of these images, for every image the index of its own)."""
    for name in names:
        if name not in caption_of:
            raise UserError(f"--prompts {path}: no line for the image {name}; add one, or remove "
                            "the image")
    texts = list(dict.fromkeys(caption_of[name] for name in names))
    index_of = {text: i for i, text in enumerate(texts)}
    return texts, [index_of[caption_of[name]] for name in names]


# ---- The command -------------------------------------------------------------------------------


def main(args):
    """python -m kit.encode"""
    proc = Processes(args.amp)
    out = Path(args.out)
    check_positive(args, "batch_size", "image_size", "scale")
    check_workers(args)
    source = open_source(args)
    asked = {"vae": args.vae if source.data else None, "image_size": source.size,
             "scale": args.scale, "text_encoder": args.text_encoder if source.texts else None,
             "amp": "bf16" if proc.bf16 else "off"}
    rows = zlib.crc32(repr((source.names, source.labels, source.texts)).encode())
    if is_finished(out, asked, rows):
        say(proc, f"{out}: finished already")
        return
    vae = load_vae(proc, args.vae) if source.data else None
    text_encoder = load_text_encoder(proc, args.text_encoder) if source.texts else None
    scale = None
    if source.data:
        scale = args.scale or default_scale(vae)

    proc.barrier()  # all have looked
    out.mkdir(parents=True, exist_ok=True)
    if proc.is_main:
        write_text(out / "begun.json", json.dumps({"asked": asked}))
    arrays = {}  # name: file
    if source.data:
        arrays["latents"] = write_latents(proc, out, source, vae, scale, args.batch_size)
    if source.texts:
        arrays["embeddings"] = write_embeddings(proc, out, source, text_encoder, args.batch_size)

    if proc.is_main:
        if source.data:
            save_array(out / "labels.npy", np.array(source.labels))
        if source.texts:
            null = encode_prompts(text_encoder, [""])
            save_array(out / "null.npy", null.half().cpu().numpy())
            write_text(out / "prompts.json", json.dumps(source.texts))
        for name, file in arrays.items():
            os.replace(file, out / f"{name}.npy")
        classes = source.data.classes if source.data and not source.texts else 0
        names = source.data.class_names if classes else None
        meta = {"classes": classes, "class_names": names, "scale": scale, "asked": asked,
                "rows": rows}
        write_text(out / "meta.json", json.dumps(meta))
        (out / "begun.json").unlink()
    proc.barrier()
    made = []
    if source.data:
        made.append(f"{len(source.names)} images, latents times {scale:g}")
    if source.texts:
        made.append(f"{len(source.texts)} prompts")
    say(proc, f"{out}: {', '.join(made)}")


def is_finished(out, asked, rows):
    """Does folder `out` hold the whole cache already? False where it is not begun, or in part.

    asked: the arguments that change the cache. rows: a number that stands for the names of images,
    labels and prompts. Raises UserError where the folder holds another cache.
    """
    meta = out / "meta.json"
    found = [file for file in (meta, out / "begun.json") if file.exists()]
    if not found:
        return False
    try:
        held = dict(json.loads(found[0].read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{found[0]} is damaged: delete it to make the cache again")
    for key in asked:
        before = held.get("asked", {}).get(key)
        if before != asked[key]:
            raise UserError(f"--out {out} holds a cache made with {flag(key)} {before}, now it is "
                            f"{asked[key]}; repeat the old command, or choose another --out")
    if found[0] != meta:
        return False
    if held["rows"] != rows:
        raise UserError(f"--out {out} holds a finished cache of other images, labels or prompts; "
                        "choose another --out")
    return True


def write_latents(proc, out, source, vae, scale, batch_size):
    """Latents of all images and of their mirror images -> the file of write_pieces."""
    def encode(x):
        x = x.to(proc.device)
        views = [encode_images(vae, to_float(view)) for view in (x, x.flip(-1))]
        return scale * torch.stack(views, 1)                            # (B, F, S, C, h, w)

    crops = Crops(source.data, source.size)
    produce = encode_chunks(proc, crops, batch_size, source.workers, encode, "images")
    return write_pieces(proc, out, "latents", source.names, produce)


def write_embeddings(proc, out, source, text_encoder, batch_size):
    """Embeddings of all texts -> the file of write_pieces."""
    def encode(texts):
        return encode_prompts(text_encoder, texts)                      # (B, T, D)

    produce = encode_chunks(proc, source.texts, batch_size, 0, encode, "prompts")
    return write_pieces(proc, out, "embeddings", source.texts, produce)


def encode_chunks(proc, items, batch, workers, encode, desc):
    """The `produce` of write_pieces: encode(batch of items) -> rows, over this rank's chunks."""
    count = (len(items) + sampling.CHUNK - 1) // sampling.CHUNK

    @torch.no_grad()
    def produce(todo):
        chunks = []
        for c in range(proc.rank, count, proc.world):
            if todo(c):
                chunks.append(range(len(items))[c * sampling.CHUNK:(c + 1) * sampling.CHUNK])
        batches = []
        for chunk in chunks:
            batches.extend(chunk[i:i + batch] for i in range(0, len(chunk), batch))
        loader = unwrap_worker_errors(DataLoader(items, batch_sampler=batches, num_workers=workers,
                                                 worker_init_fn=start_worker))
        with progress_bar(proc, sum(map(len, chunks)), desc) as progress:
            for chunk in chunks:
                parts = []
                for _ in range(0, len(chunk), batch):
                    with torch.autocast(proc.device.type, torch.bfloat16, enabled=proc.bf16):
                        parts.append(encode(next(loader)).float())
                    progress.update(len(parts[-1]))
                yield chunk[0], torch.cat(parts)

    return produce


# ---- Arguments ---------------------------------------------------------------------------------


def parser():
    p = make_parser("kit.encode", __doc__)
    group = p.add_argument_group("images")
    group.add_argument("--data", help="a folder of images, or digits, mnist, fashion-mnist, "
                                      "cifar10")
    group.add_argument("--vae", default="stabilityai/sd-vae-ft-ema",
                       help="an autoencoder of diffusers: a folder, or a name on huggingface.co")
    group.add_argument("--image-size", type=int,
                       help="crop and scale to this size, as ADM does (default: 256; digits, "
                            "mnist and the like keep their own)")
    group.add_argument("--scale", type=float,
                       help="multiply latents by this (default: as the autoencoder says)")
    group = p.add_argument_group("prompts")
    group.add_argument("--prompts", help="captions.jsonl, or without --data a text file with one "
                                         "prompt per line")
    group.add_argument("--text-encoder", default="openai/clip-vit-large-patch14",
                       help="a CLIP of transformers, alone or in a Stable Diffusion pipeline")
    group = p.add_argument_group("the run")
    group.add_argument("--out", required=True, help="the folder to make")
    group.add_argument("--batch-size", type=int, default=32,
                       help="images or prompts per forward and process")
    group.add_argument("--workers", type=int,
                       help="processes that read images (default: 4; 0: none)")
    group.add_argument("--amp", choices=["auto", "bf16", "off"], default="off",
                       help="autocast of the encoders (default: off, float32)")
    return p


if __name__ == "__main__":
    run_script(main, parser().parse_args())
