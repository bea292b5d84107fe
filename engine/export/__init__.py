"""From a finished run to a Hugging Face BLIP-2 folder."""
