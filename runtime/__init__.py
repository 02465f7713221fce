"""stylemuse: many styles in one forward pass, on masked generative transformers."""
