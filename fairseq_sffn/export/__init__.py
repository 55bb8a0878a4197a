"""Models outside fairseq: an exported folder, and what is copied into it.

- :mod:`.decoder`: fairseq's Transformer decoder with sparse layers, in plain PyTorch.
- :mod:`.description`: describes a trained model of fairseq in plain values, or refuses it.
- :mod:`.text`: the tokenizers, in plain Python. They split text by :mod:`.sentencepiece_text` or
  :mod:`.gpt2_text`.
- :mod:`.tokenizer_files`: the files of a tokenizer, from SentencePiece's or GPT-2's files.
- :mod:`.tokenizer_check`: refuses a tokenizer that did not split the training text.
- :mod:`.hugging_face`: the classes that transformers loads. They wrap :mod:`.decoder` and
  :mod:`.text`.
- :mod:`.vendoring`: copies this code and the framework into a folder.
- :mod:`.tensor_files`: reads and writes safetensors files.

Nothing here is imported for training. ``fairseq-sffn export`` and ``fairseq-sffn import`` are in
:mod:`..tools`.
"""
