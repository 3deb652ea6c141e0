"""CLIP's public weights: where they can be had, and which file a name means.

    path, said = find("ViT-L/14")  # or a file, a folder, "openai/clip-vit-large-patch14"

`said` is what is known of the file beside its tensors, as `clip_layout.read_listing` gives it.
"""

import os
from pathlib import Path

from support import clip_layout, files

# Addresses ----------------------------------------------------------------------------------------

# OpenAI's storage, and what stands before it: the address in its own code, which often fails.
HOSTS = ("https://openaipublic.blob.core.windows.net/clip",
         "https://openaipublic.azureedge.net/clip")
PUBLIC_CLIPS = {  # name: SHA-256 of OpenAI's archive (openai/CLIP, clip/clip.py)
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
MIRRORS = (  # the same weights on Hugging Face: name, repository, revision, file, SHA-256
    ("ViT-L/14", "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41",
     "model.safetensors", "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"),
    ("ViT-L/14", "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41",
     "pytorch_model.bin", "f1a17cdbe0f36fec524f5cafb1c261ea3bbbc13e346e0f74fc9eb0460dedd0d3"),
    ("ViT-B/32", "timm/vit_base_patch32_clip_224.openai",
     "a6f597a30f7b82c51704746581f9a4e41421e878", "open_clip_model.safetensors",
     "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31"),
    ("ViT-B/32", "openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
     "pytorch_model.bin", "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f"),
)
BPE_FILE = "bpe_simple_vocab_16e6.txt.gz"
BPE_DIGEST = "sha256:924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
BPE_URLS = (f"https://raw.githubusercontent.com/openai/CLIP/main/clip/{BPE_FILE}",
            f"{HOSTS[0]}/{BPE_FILE}")


def fetch_bpe(cache_dir=None):
    """The path of the public BPE file, downloaded where it is absent. Raises as `files.fetch`."""
    path = files.cache_folder(cache_dir) / BPE_FILE
    files.fetch(BPE_URLS, path, BPE_DIGEST, "pass --bpe PATH")
    return path


def sources(name, folder):
    """What is known to have the weights `name` (a public name, or a repository on Hugging Face):
    [(path below `folder`, addresses, digest)], best first; [] for an unknown name."""
    found = []
    if name in PUBLIC_CLIPS:
        digest, file = PUBLIC_CLIPS[name], name.replace("/", "-").replace("@", "-") + ".pt"
        found.append((folder / file, [f"{host}/models/{digest}/{file}" for host in HOSTS], digest))
    for public, repository, revision, file, digest in MIRRORS:
        if name in (public, repository):
            path = folder / (repository.split("/")[1] + Path(file).suffix)
            url = f"https://huggingface.co/{repository}/resolve/{revision}/{file}"
            found.append((path, [url], digest))
    return found


def download(name, cache_dir):
    """The path of known weights: the first of `sources` that lies in the cache, else that can be
    had. Raises FileNotFoundError with every address, ValueError for a damaged file there."""
    failures, known = [], sources(name, files.cache_folder(cache_dir))
    known.sort(key=lambda source: not source[0].is_file())  # a stable sort: best first otherwise
    for path, urls, digest in known:
        try:
            files.fetch(urls, path, f"sha256:{digest}", "pass --clip PATH")
            return path
        except FileNotFoundError as error:
            failures.append(str(error))
    raise FileNotFoundError("; ".join(failures))


# From a name to a file ----------------------------------------------------------------------------

def snapshot_file(folder):
    """The weights in a folder as Hugging Face keeps them, or None."""
    return next((folder / name for name in clip_layout.LISTINGS if (folder / name).is_file()), None)


def cached_snapshot(repository):
    """The weights of `org/name` in the cache of Hugging Face's own programs, or None."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{home}/hub"))
    folder = cache / f"models--{repository.replace('/', '--')}"
    main = folder / "refs" / "main"  # the name of the newest snapshot
    if not main.is_file():
        return None
    return snapshot_file(folder / "snapshots" / main.read_text().strip())


def find(name, cache_dir=None):
    """-> (path of the weights, what is said of them: arguments of CLIP by name).

    name: one of PUBLIC_CLIPS, a file, a folder that holds one of clip_layout.LISTINGS, or a name on
    Hugging Face: from its cache, else downloaded to ours where the digest is known. Raises
    FileNotFoundError and ValueError where there is none.
    """
    path = Path(name)
    if name not in PUBLIC_CLIPS and path.exists():
        weights = snapshot_file(path) if path.is_dir() else path
        if weights is None:
            known = ", ".join(clip_layout.LISTINGS)
            raise FileNotFoundError(f"{path} holds no CLIP; expected one of {known}, or a file")
        return weights, clip_layout.read_listing(weights)
    cached = None if name in PUBLIC_CLIPS else cached_snapshot(name)
    if cached:
        return cached, clip_layout.read_listing(cached)
    if sources(name, path):
        return download(name, cache_dir), {"activation": "quickgelu"}  # OpenAI's, by their digest
    kind = FileNotFoundError if path.suffix else ValueError
    raise kind(f"{name!r} is neither a file, a folder nor a public CLIP; these are "
               f"{', '.join(PUBLIC_CLIPS)}, or org/name that `hf download` has fetched")
