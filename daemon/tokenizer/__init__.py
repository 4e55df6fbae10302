"""Text to tokens and back: the tokenizer, chat templates in a process of their own, preparing prompts.

May import: errors, protocol.
"""
