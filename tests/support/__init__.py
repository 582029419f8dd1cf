"""What tests need around them: servers, a faulty network, patience."""
