"""From a prompt to text: sampling, the one decoding loop, and the stream of text over it."""
