"""Sizes of the model that plans are made for: wide enough for memory to have a shape, small enough for a test."""

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,  # of every shape a multiple of 128: the store's segments have no gaps
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
