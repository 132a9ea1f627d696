"""Work shared by the processes of torch.distributed."""
