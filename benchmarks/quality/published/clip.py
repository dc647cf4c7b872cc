"""Pictures and texts as CLIP's vectors, whose cosine says how alike they are (Hessel et al., arXiv 2104.08718)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from semantica.errors import UserError
from semantica.files import read_json

BATCH = 32


class Clip:
    """Both towers of a CLIP model, from a local folder in safetensors.

    Args:
        folder: as transformers' `CLIPModel.save_pretrained` and its tokenizer write it.

    Raises:
        UserError: something else, weights that are missing or not in safetensors, or code to run.
    """

    def __init__(self, folder: Path, device):
        from semantica.fused.towers import CLIP_MEAN, CLIP_STD, ClipPictures
        from semantica.model.encoders import refuse_code, weights_sha256
        from semantica.pipelines.runfolder import readable
        from semantica.pipelines.weights import load_model
        from semantica.tokens import ClipTokenizer

        if not (folder / "config.json").is_file():
            raise UserError(f"--clip {folder} has no config.json: give the folder of a CLIP model")
        config = read_json(folder / "config.json")
        refuse_code(config, folder / "config.json")
        if config.get("model_type") != "clip":
            raise UserError(f"--clip {folder} holds a {config.get('model_type')!r}: expected 'clip', both towers of it")
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"--clip {folder} has no safetensors weights: other files are never read")
        path = folder / "preprocessor_config.json"
        settings = read_json(path) if path.is_file() else {}
        with readable(folder):
            self.model = load_model("CLIPModel", folder).eval().requires_grad_(False).to(device)
            self.tokenizer = ClipTokenizer(folder)
            scaling = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
            # its preparation of pictures alone is used
            self.prepare = ClipPictures(self.model.vision_model, False, *scaling).to(device)
        self.device, self.identity = device, weights_sha256(self.model)

    def pictures(self, paths: Sequence[Path]) -> np.ndarray:
        """Unit vectors float32 `[N, F]` of picture files, the square in the middle of each. Raises `BadImage`."""
        from semantica.images import load_image

        return self.of([load_image(path) for path in paths])

    def of(self, pictures: Sequence) -> np.ndarray:
        """Unit vectors float32 `[N, F]` of RGB Pillow images."""
        import torch

        made = []
        with torch.no_grad():
            for start in range(0, len(pictures), BATCH):
                x = self.prepare.prepare(pictures[start : start + BATCH]).to(self.device)
                pixels = ((x + 1) / 2 - self.prepare.mean) / self.prepare.std
                made.append(self.model.visual_projection(self.model.vision_model(pixels).pooler_output))
        return unit(made)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 `[N, F]`. Raises `UserError` for what is no text."""
        import torch

        made, numbers = [], torch.from_numpy(self.tokenizer(texts))
        with torch.no_grad():
            for some in numbers.split(BATCH):
                made.append(self.model.text_projection(self.model.text_model(some.to(self.device)).pooler_output))
        return unit(made)


def unit(parts: list) -> np.ndarray:
    """Vectors, batch after batch, as one array of unit vectors."""
    import torch

    return torch.nn.functional.normalize(torch.cat(parts), dim=-1).float().cpu().numpy()
