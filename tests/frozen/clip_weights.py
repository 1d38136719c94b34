"""Small models of open_clip with random weights, in the layout in which such models are published."""

import json

import torch

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
SIGLIP = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
CLIP = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
TIMM = {"image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_proj": None}
MODELS = {
    "clip": ({"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}, CLIP),
    "quick": ({"embed_dim": 12, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT}, CLIP),
    "siglip": (
        {
            "embed_dim": 12,
            "custom_text": True,
            "vision_cfg": {**TIMM, "timm_pool": "token"},
            "text_cfg": TEXT,
        },
        SIGLIP,
    ),
}


def publish(folder, config, preprocessing):
    """A folder as on the hub; gives open_clip's own model of the same weights."""
    import open_clip

    folder.mkdir(parents=True)
    facts = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    torch.manual_seed(5)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    with torch.no_grad():
        for parameter in model.visual.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return open_clip.create_model(f"local-dir:{folder}").eval()
