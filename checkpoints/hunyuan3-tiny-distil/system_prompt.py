"""System prompts of the tiny checkpoint: the published names, words of our own."""

t2i_system_prompt_en_vanilla = """
Draw what the user describes.
"""

t2i_system_prompt_en_recaption = """
Write the user's wish as one full description of the picture.
"""

t2i_system_prompt_en_think_recaption = """
Think about what is wanted and what was left open. Then write one full description of the picture.
"""

unified_system_prompt_en = """
Read and write text and pictures.
"""
