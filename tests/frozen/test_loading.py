"""The networks of a checkpoint's data are loaded by the names and the hashes that its spec states."""

import dataclasses

import pytest
import torch

from tone_shards import short_spec
from vab.frozen.loading import load_networks
from vab.frozen.protocols import Codec, VisionEncoder
from vab.spec import NOT_STATED, UserError


def test_both_networks_of_a_spec_are_loaded():
    codec, vision = load_networks(short_spec(), "cpu")
    assert isinstance(codec, Codec)
    assert isinstance(vision, VisionEncoder)
    assert (codec.name, vision.name) == ("tiny", "tiny")
    assert next(vision.parameters()).device == torch.device("cpu")


@pytest.mark.parametrize(("audio", "video"), [(True, False), (False, True), (False, False)])
def test_a_network_that_is_not_needed_is_neither_loaded_nor_checked(audio, video):
    unknown = {} if audio else {"codec": "absent", "codec_hash": NOT_STATED}
    unknown |= {} if video else {"vision": "absent", "vision_hash": NOT_STATED}
    codec, vision = load_networks(dataclasses.replace(short_spec(), **unknown), "cpu", audio=audio, video=video)
    assert (codec is not None, vision is not None) == (audio, video)


@pytest.mark.parametrize(("field", "kind"), [("codec_hash", "codec"), ("vision_hash", "vision encoder")])
def test_other_weights_are_refused_with_both_hashes(field, kind):
    spec = dataclasses.replace(short_spec(), **{field: "0" * 64})
    installed = getattr(short_spec(), field)[:12]
    with pytest.raises(
        UserError, match=rf"trained with {kind} tiny of weights 0{{12}}, but {installed} is installed: install"
    ):
        load_networks(spec)
    with pytest.raises(UserError, match="was trained on imported"):
        load_networks(dataclasses.replace(spec, **{field: NOT_STATED}))
