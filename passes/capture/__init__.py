"""Turn what Dynamo or torch.export hands over into one functional ATen graph."""
