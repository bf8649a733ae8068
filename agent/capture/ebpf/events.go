package ebpf

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sync/errgroup"

	"ringfence.dev/agent/capture"
	"ringfence.dev/bpf"
	"ringfence.dev/proxy/flow"
)

// Run beats, follows routes, reclaims table entries and delivers events, until
// ctx ends. While it does not run, the hooks take the agent for dead after the
// heartbeat limit. Redirected connections give no event: the agent accepts them.
// An event that finds the ring full is dropped and counted as event_lost.
//
// A change of table layout since the previous agent is completed here: scopes
// added before Run are covered without a gap.
func (b *Backend) Run(ctx context.Context, event func(capture.Event)) error {
	if err := b.heartbeat(); err != nil {
		return err
	}
	if err := b.inst.Commit(); err != nil {
		return err
	}
	ring, err := ringbuf.NewReader(b.inst.Maps.RfEvents)
	if err != nil {
		return fmt.Errorf("open event ring: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return b.runBeat(ctx) })
	g.Go(func() error { return b.runReclaim(ctx) })
	g.Go(func() error { return b.runRoutes(ctx) })
	g.Go(func() error { return b.runEvents(ring, event) })
	g.Go(func() error {
		<-ctx.Done()
		return ring.Close() // ends runEvents
	})
	if err := g.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("ebpf capture: %w", err)
	}
	return nil
}

func (b *Backend) runBeat(ctx context.Context) error {
	t := time.NewTicker(beatEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			if err := b.heartbeat(); err != nil {
				return err
			}
		}
	}
}

func (b *Backend) runReclaim(ctx context.Context) error {
	t := time.NewTicker(reclaimEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			if err := b.reclaim(); err != nil {
				b.log.Warn("listening ports not reclaimed", "error", err)
			}
		}
	}
}

func (b *Backend) runEvents(ring *ringbuf.Reader, event func(capture.Event)) error {
	var rec ringbuf.Record
	for {
		err := ring.ReadInto(&rec)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read event ring: %w", err)
		}
		raw, ok := bpf.ParseEvent(rec.RawSample)
		if !ok {
			continue
		}
		if s := b.ofNS(raw.Netns); s != nil {
			event(eventOf(s.name, &raw, time.Now(), monotonic()))
		}
	}
}

var eventKinds = map[uint32]capture.EventKind{
	bpf.EventConnected: capture.Connected,
	bpf.EventAccepted:  capture.Accepted,
	bpf.EventListening: capture.Listening,
	bpf.EventClosed:    capture.Closed,
	bpf.EventRefused:   capture.Refused,
	bpf.EventBypass:    capture.Bypass,
}

// eventOf gives a kernel record its name, wall clock and Go types. now and mono are the same moment on both clocks.
func eventOf(scope string, raw *bpf.Event, now time.Time, mono uint64) capture.Event {
	e := capture.Event{
		Time: now.Add(-time.Duration(mono - raw.Time)), Kind: eventKinds[raw.Kind],
		Comm: bpf.CommOf(raw), Protocol: uint8(min(raw.Protocol, 255)), Bypassing: raw.Bypass == 1,
		Reason: bpf.Reason(raw.Reason).String(), ByPolicy: bpf.Reason(raw.Reason) == bpf.Denied,
		Flow: flow.Flow{
			Scope:       scope,
			Source:      netip.AddrPortFrom(bpf.FromAddress(raw.Src), bpf.FromPort(raw.Sport)),
			Destination: netip.AddrPortFrom(bpf.FromAddress(raw.Note.Dst), bpf.FromPort(raw.Note.Dport)),
			Device:      raw.Note.Device,
			BoundSource: bpf.FromAddress(raw.Note.Bound),
		},
	}
	switch e.Kind {
	case capture.Accepted, capture.Listening, capture.Closed:
		e.Flow.Direction = flow.Inbound
	default:
		e.Flow.Caller = evidenceOf(&raw.Note)
	}
	return e
}
