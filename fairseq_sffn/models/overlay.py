"""Calling a method of a module with some of its attributes replaced.

fairseq's encoders and decoders pass only hidden states and masks to their layers. fairseq's layers
pass only hidden states to their feed-forward network. Both look up the callee as an attribute of
``self``. The plugin calls these methods of fairseq with an :class:`Overlay` as ``self``. The
overlay replaces the attribute by a function of one forward pass. This function adds the token ids
to the arguments, and takes the routing from the results. :mod:`.decoder` describes the whole path.

Why this is correct:

- No module stores anything of a forward pass. Passes of one model may interleave, also in threads.
  An exception leaves no state behind. Models can be copied and pickled at any time.
- Activation checkpointing and FSDP wrap a whole layer. Everything that the layer needs is an
  argument, and everything that it computes is a returned tensor. Losses have gradients through the
  second run of a checkpointed layer. Only the counts of its first run are used.
- LayerDrop skips a layer inside fairseq's loop. The routing of this layer then stays empty.
- Each forward pass before a backward pass (``--update-freq``) has its own routing.
- The dtype of autocast is also an argument, because a checkpointed layer runs again without
  autocast.
"""

from typing import Any


class Overlay:
    """An object with some attributes replaced. The object itself does not change.

    ::

        TransformerDecoderLayerBase.forward(Overlay(layer, fc1=fc1), x)

    Args:
        original: a module or options, which have all other attributes. Its own methods run on it.
        attributes: name -> replacement of the attribute.
    """

    def __init__(self, original: Any, **attributes: Any) -> None:
        self._original = original
        for name, value in attributes.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
