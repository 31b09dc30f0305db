"""Images and prompts -> cached latents and embeddings, and latents -> images. What needs the optional extra
(pip install diffusers transformers) is in this file.

    python data.py encode --data IMAGES --out LATENTS                                   latents and labels, as --data takes them
    python data.py encode --data IMAGES --prompts captions.jsonl --out LATENTS          latents and embedded captions
    python data.py encode --prompts prompts.txt --out PROMPTS                           embeddings alone, for sample.py --prompts
    torchrun --nproc_per_node 8 data.py encode --data IMAGES --out LATENTS              the same cache, made by eight processes

Killed at any point, the same command continues; finished, it says so. captions.jsonl has a line {"file": "below/the/folder.png", "text": "..."}
for every image. The cache's format is told by data.Latents; prompts.json beside it names the rows of embeddings.npy.
"""
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import runtime
from checkpoints import local_first
from data import CHUNK, ImageFolder, Latents, center_crop, labels_of, load, one_thread, plainly, save_array, to_float, to_uint8, write_pieces
from runtime import Processes, UserError, bar, say, write_text

# ---- The models -------------------------------------------------------------------------------------


def load_extra(proc, flag, name, places, load):
    """load(sub-folder) -> network, at the place where model `name` (a folder or a name on the hub) has it; on the device, frozen. Raises UserError."""
    os.environ.update({} if proc.main else {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
    for place in [p for p in places if (Path(name) / p).is_dir()][-1:] or places:
        try:
            net, report = load(place)
            if report["missing_keys"]:
                raise ValueError(f"it lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}")
            return net.to(proc.device, torch.float32).eval().requires_grad_(False)
        except ImportError as e:
            raise UserError(f"{flag} {name} needs an optional extra ({str(e).splitlines()[0]}): pip install diffusers transformers")
        except Exception as e:  # huggingface_hub's, json's, safetensors', ...
            why = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
    raise UserError(f"{flag} {name}: cannot be loaded ({why}); name a folder, or a model of huggingface.co that this machine can reach")


def load_vae(proc, name, flag="--vae"):
    """diffusers' AutoencoderKL or VQModel, alone or inside a pipeline. Raises UserError."""
    def load(place):
        import diffusers
        kind = diffusers.AutoencoderKL.load_config(name, subfolder=place)["_class_name"]
        if kind not in ("AutoencoderKL", "VQModel"):
            raise ValueError(f"it is a {kind}, not an AutoencoderKL or VQModel")
        return getattr(diffusers, kind).from_pretrained(name, subfolder=place, output_loading_info=True)
    return local_first(lambda: load_extra(proc, flag, name, ("", "vqvae", "vae"), load))


def load_text_encoder(proc, name, flag="--text-encoder"):
    """transformers' CLIP text model, alone or inside a Stable Diffusion pipeline, with its tokenizer as .tokenizer. Raises UserError."""
    def load(place):
        import transformers
        net, report = transformers.CLIPTextModel.from_pretrained(name, subfolder=place, output_loading_info=True)
        net.tokenizer = transformers.CLIPTokenizer.from_pretrained(name, subfolder="tokenizer" if place else "")
        return net, report
    return local_first(lambda: load_extra(proc, flag, name, ("", "text_encoder"), load))


def encode_images(vae, x):
    """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of their posteriors (B, 2, C, h, w); of a VQModel the latents, not yet
    quantised, (B, 1, C, h, w)."""
    out = vae.encode(x)
    return torch.stack([out.latent_dist.mean, out.latent_dist.std], 1) if hasattr(out, "latent_dist") else out.latents[:, None]


@torch.no_grad()
def decode_images(vae, z, batch=16):
    """Latents (N, C, h, w), divided by their scale -> images (N, 3, H, W) uint8. Raises UserError."""
    if vae.config.latent_channels != z.shape[1]:
        raise UserError(f"--decode: this autoencoder's latents have {vae.config.latent_channels} channels, the model's {z.shape[1]}")
    return torch.cat([to_uint8(vae.decode(part).sample) for part in z.split(batch)])


def encode_prompts(net, texts):
    """B strings -> (B, T, D), the last hidden state: padded and cut to the model's T = 77 tokens, without a mask, as in Stable Diffusion v1."""
    tokens = net.tokenizer(texts, padding="max_length", max_length=net.config.max_position_embeddings, truncation=True, return_tensors="pt")
    return net(tokens.input_ids.to(net.device)).last_hidden_state


# ---- The command ------------------------------------------------------------------------------------


class Crops:
    """What is encoded: item i is image i of a pixel data set, (3, size, size) uint8."""

    def __init__(self, data, size):
        self.data, self.size = data, size

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if isinstance(self.data, ImageFolder):
            return self.data[(i, 0)][0]
        image = Image.fromarray(self.data.x[i].expand(3, -1, -1).permute(1, 2, 0).numpy())
        return torch.from_numpy(center_crop(image, self.size)).permute(2, 0, 1)


def encoded(proc, items, batch, workers, encode, desc):
    """-> produce(todo) for write_pieces, which does encode(batch of items) -> rows over this rank's chunks."""
    @torch.no_grad()
    def produce(todo):
        chunks = [range(len(items))[c * CHUNK:(c + 1) * CHUNK] for c in range(proc.rank, (len(items) + CHUNK - 1) // CHUNK, proc.world) if todo(c)]
        batches = [c[i:i + batch] for c in chunks for i in range(0, len(c), batch)]
        loader = plainly(DataLoader(items, batch_sampler=batches, num_workers=workers, worker_init_fn=one_thread))
        with bar(proc, sum(map(len, chunks)), desc) as progress:
            for c in chunks:
                parts = []
                for i in range(0, len(c), batch):
                    with torch.autocast(proc.device.type, torch.bfloat16, enabled=proc.bf16):
                        parts.append(encode(next(loader)).float())
                    progress.update(len(parts[-1]))
                yield c[0], torch.cat(parts)
    return produce


def names_of(data):
    """What the images of a set are called in prompts and caches."""
    if isinstance(data, ImageFolder):
        return [f.relative_to(data.name).as_posix() for f, _ in data.files]
    return [f"{data.name}/{i}" for i in range(len(data))]


def read_prompts(path, data=None):
    """--prompts FILE -> (texts to embed, for every image of data the index of its own).

    FILE.jsonl has a line {"file": image's name below the folder, "text": its caption} for every image; equal captions are embedded once.
    Without images the texts of its lines, or in another file the lines, in their order. Raises UserError.
    """
    table = Path(path).suffix == ".jsonl"
    try:
        texts = [line for line in Path(path).read_text("utf-8-sig").split("\n") if line.strip()]
        if table:
            lines = [json.loads(line) for line in texts]
            texts, files = [str(line["text"]) for line in lines], [line["file"] for line in lines] if data else []
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'--prompts {path}: cannot be read ({e}); want one prompt a line, or in a .jsonl file lines of {{"file": ..., "text": ...}}')
    if not texts:
        raise UserError(f"--prompts {path}: holds no prompts")
    if not data:
        return texts, []
    if not table or not isinstance(data, ImageFolder):
        raise UserError(f'--prompts {path}: captions go with a folder of images, and stand in a .jsonl file with lines of {{"file": ..., "text": ...}}')
    captions, names = dict(zip(files, texts)), names_of(data)
    if len(captions) < len(files):
        raise UserError(f"--prompts {path}: names a file twice; an image has one caption")
    for name in names:
        if name not in captions:
            raise UserError(f"--prompts {path}: no line for the image {name}; add one, or remove the image")
    index = {text: i for i, text in enumerate(dict.fromkeys(captions[name] for name in names))}
    return list(index), [index[captions[name]] for name in names]


def main(args):
    """python data.py encode"""
    proc, out = Processes(args.amp), Path(args.out)
    runtime.check_positive(args, "batch_size", "image_size", "scale")
    if not args.data and not args.prompts:
        raise UserError("encode what? Name images with --data, prompts with --prompts, or both")
    data = load(args.data, args.image_size or 256) if args.data else None
    if isinstance(data, Latents):
        raise UserError(f"--data {args.data} holds latents already")
    size, names = (args.image_size or data.shape[-1], names_of(data)) if data else (None, [])
    texts, labels = read_prompts(args.prompts, data) if args.prompts else ([], labels_of(data).tolist())
    asked = {"vae": args.vae if data else None, "image_size": size, "scale": args.scale, "text_encoder": args.text_encoder if texts else None,
             "amp": "bf16" if proc.bf16 else "off"}
    rows = zlib.crc32(repr((names, labels, texts)).encode())
    meta, begun = out / "meta.json", out / "begun.json"
    for file in [f for f in (meta, begun) if f.exists()][:1]:
        try:
            held = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            raise UserError(f"{file} is damaged: delete it to make the cache again")
        for key in asked:
            if (old := held.get("asked", {}).get(key)) != asked[key]:
                raise UserError(f"--out {out} holds a cache made with {runtime.flag(key)} {old}, now it is {asked[key]}; "
                                f"repeat the old command, or choose another --out")
        if file == meta:
            if held["rows"] != rows:
                raise UserError(f"--out {out} holds a finished cache of other images, labels or prompts; choose another --out")
            return say(proc, f"{out}: finished already")
    vae, clip = load_vae(proc, args.vae) if data else None, load_text_encoder(proc, args.text_encoder) if texts else None
    own = lambda: vae.config.scaling_factor if hasattr(vae.config, "scaling_factor") and type(vae).__name__ == "AutoencoderKL" else 1.0  # VQ: latent diffusion's
    scale, done = (args.scale or own()) if data else None, {}
    proc.barrier()  # all have looked
    out.mkdir(parents=True, exist_ok=True)
    if proc.main:
        write_text(begun, json.dumps({"asked": asked}))
    if data:
        both = lambda x: scale * torch.stack([encode_images(vae, to_float(v)) for v in (x.to(proc.device), x.to(proc.device).flip(-1))], 1)
        produce = encoded(proc, Crops(data, size), args.batch_size, min(4, os.cpu_count()), both, "images")
        done["latents"] = write_pieces(proc, out, "latents", names, produce)
    if texts:
        produce = encoded(proc, texts, args.batch_size, 0, lambda t: encode_prompts(clip, t), "prompts")
        done["embeddings"] = write_pieces(proc, out, "embeddings", texts, produce)
    if proc.main:
        if data:
            save_array(out / "labels.npy", np.array(labels))
        if texts:
            save_array(out / "null.npy", encode_prompts(clip, [""]).half().cpu().numpy())
            write_text(out / "prompts.json", json.dumps(texts))
        for name, file in done.items():
            os.replace(file, out / f"{name}.npy")
        write_text(meta, json.dumps({"classes": data.classes if data and not texts else 0, "scale": scale, "asked": asked, "rows": rows}))
        begun.unlink()
    proc.barrier()
    what = f"{len(names)} images, latents times {scale:g}" if data else "", f"{len(texts)} prompts" if texts else ""
    say(proc, f"{out}: {', '.join(filter(None, what))}")


# ---- Arguments --------------------------------------------------------------------------------------


def parser():
    p = runtime.Parser(prog="data.py", description=__doc__, formatter_class=runtime.Raw)
    p.add_argument("command", choices=["encode"])
    p.add_argument("--data", help="a folder of images, or digits, mnist, fashion-mnist, cifar10")
    p.add_argument("--vae", default="stabilityai/sd-vae-ft-ema", help="an autoencoder of diffusers: a folder, or a name on huggingface.co (default: %(default)s)")
    p.add_argument("--image-size", type=int, help="crop and scale to this size, as ADM does (default: 256; that of digits, mnist, ... their own)")
    p.add_argument("--scale", type=float, help="latents are multiplied by this (default: as the autoencoder says)")
    p.add_argument("--prompts", help="captions.jsonl, or without --data a text file with a prompt a line")
    p.add_argument("--text-encoder", default="openai/clip-vit-large-patch14",
                   help="a CLIP of transformers, alone or in a Stable Diffusion pipeline (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=32, help="images or prompts a forward and process")
    p.add_argument("--amp", choices=["auto", "bf16", "off"], default="off", help="autocast of the encoders (default: off, float32)")
    p.add_argument("--out", required=True, help="the folder to make")
    return p
