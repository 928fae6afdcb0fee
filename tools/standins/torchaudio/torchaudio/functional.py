"""An empty torchaudio.functional: ComfyUI imports it and calls it only in its audio nodes."""
