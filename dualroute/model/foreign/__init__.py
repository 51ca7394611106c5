"""Models that were trained elsewhere: folders of Hugging Face, llama2.c, GPT-2 as a teacher."""
