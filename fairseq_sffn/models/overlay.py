"""One call of a module's method with other attributes.

fairseq's encoders and decoders give their layers hidden states and masks, and its layers give their
feed-forward network hidden states alone. Both find what they call as an attribute of ``self``. The
plugin runs these methods of fairseq with an :class:`Overlay` as ``self``. There, a function that
belongs to one forward pass stands for the attribute: it adds the token ids on the way down and
takes the routing on the way up. See :mod:`.decoder` for the whole path.

Why this is right:

- No module keeps anything of a pass. Passes of one model may interleave, also in threads; an
  exception leaves nothing behind; models are copied and pickled at any time.
- Activation checkpointing and FSDP wrap a layer as a whole. All that it needs comes in as
  arguments and all that it finds goes out as tensors. Losses have gradients through the second run
  of a checkpointed layer, and only the counts of its first run are used.
- LayerDrop skips a layer inside fairseq's loop. The layer then keeps its empty routing.
- Several passes before a backward (``--update-freq``) have a routing each.
- The dtype of autocast is an argument too, since a checkpointed layer runs again without autocast.
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
