"""A module of which one call sees other attributes.

fairseq's encoders and decoders give their layers hidden states and masks, and its layers give their
feed-forward network hidden states alone. Both find what they call as an attribute of ``self``. The
plugin runs these methods of fairseq with an :class:`Overlay` as ``self``. There, a function that
belongs to one forward pass stands for the attribute: it adds the token ids on the way down and
takes the routing on the way up. See :mod:`.decoder` for the whole path.

Why this is right:

- No module keeps anything of a pass. Passes of one model may interleave, also in threads; an
  exception leaves nothing behind; models are copied and pickled at any time.
- Activation checkpointing and FSDP wrap the layer as a whole. All that it needs comes in as
  arguments, all that it finds goes out as tensors, so that losses have gradients through the second
  run, and only the first run's counts are used.
- LayerDrop skips a layer inside fairseq's loop, and the layer keeps its empty routing.
- Autograd sees function arguments and results, as in any model: several passes before a backward
  (``--update-freq``) and autocast need no care.
"""

from typing import Any


class Overlay:
    """A module with some attributes replaced. The module itself does not change.

    ::

        TransformerDecoderLayerBase.forward(Overlay(layer, fc1=fc1), x)

    Args:
        module: gives every attribute that is not replaced; its methods run on the module itself.
        attributes: name -> what stands in the attribute's place.
    """

    def __init__(self, module: Any, **attributes: Any) -> None:
        self._module = module
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
