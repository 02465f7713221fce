"""Who runs when: many requests in the same forward passes, joining and leaving at every step."""
