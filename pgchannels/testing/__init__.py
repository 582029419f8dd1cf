"""The tests that every channel layer has to pass, to be run against one of your own.

::

    # conftest.py
    pytest.register_assert_rewrite("pgchannels.testing")

    # test_my_layer.py
    class TestMyLayer(ChannelLayerSuite):
        @pytest_asyncio.fixture
        async def make_layer(self):
            storage = …
            async with AsyncExitStack() as stack:

                async def make(**settings):
                    layer = MyLayer(Settings(**settings), storage)
                    return await stack.enter_async_context(layer)

                yield make

``make_layer`` gives a factory of open layers on one storage that is empty at first; each call makes
one more node. They are closed when the test is over. pytest-asyncio runs the tests, in either mode.
"""

from pgchannels.testing.channels import GroupTests
from pgchannels.testing.control import CommandTests, RevocationTests, SharedRateTests
from pgchannels.testing.ephemeral import EphemeralTests
from pgchannels.testing.following import FollowingTests
from pgchannels.testing.lifecycle import LifecycleTests
from pgchannels.testing.limits import LimitTests
from pgchannels.testing.overflowing import OverflowTests
from pgchannels.testing.presence import PresenceTests
from pgchannels.testing.reading import HistoryTests, StreamTests
from pgchannels.testing.receiving import CapacityTests, ReceivingTests
from pgchannels.testing.replaying import FilterTests, SinceTests
from pgchannels.testing.sending import KeyTests, SendingTests
from pgchannels.testing.support import MakeLayer, settle, take, until

__all__ = ["ChannelLayerSuite", "MakeLayer", "settle", "take", "until"]


class ChannelLayerSuite(
    SendingTests,
    KeyTests,
    StreamTests,
    HistoryTests,
    SinceTests,
    FilterTests,
    OverflowTests,
    ReceivingTests,
    CapacityTests,
    GroupTests,
    PresenceTests,
    LimitTests,
    CommandTests,
    RevocationTests,
    SharedRateTests,
    EphemeralTests,
    FollowingTests,
    LifecycleTests,
):
    """The contract of :class:`~pgchannels.layer.ChannelLayer`, as tests. See the module."""
