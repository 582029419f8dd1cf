// Publish from Go, by pgx, in the transaction of the data.
//
//	export PGCHANNELS_DATABASE_URL=postgresql://…
//	pip install 'pgchannels[cli]' && pgchannels migrate
//	go mod init orders && go get github.com/jackc/pgx/v5
//	go run main.go
//	pgchannels tail orders:7
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

func placeOrder(ctx context.Context, pool *pgxpool.Pool, customerID int64, total int) error {
	err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		var id int64
		if err := tx.QueryRow(ctx, "insert into example_orders (customer_id, total) values ($1, $2) returning id",
			customerID, total).Scan(&id); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "select pgchannels.publish($1, $2)", fmt.Sprintf("orders:%d", customerID),
			map[string]any{"type": "order.placed", "id": id, "total": total})
		return err
	})
	if err != nil {
		return err
	}
	// Only so that it is read at once, and not up to 50 ms later: nothing depends on it.
	if _, err := pool.Exec(ctx, "notify pgchannels"); err != nil {
		log.Printf("not notified: %v", err)
	}
	return nil
}

func main() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv("PGCHANNELS_DATABASE_URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	if _, err := pool.Exec(ctx, `create table if not exists example_orders (
		id bigint generated always as identity primary key, customer_id bigint not null, total numeric not null)`); err != nil {
		log.Fatal(err)
	}
	if err := placeOrder(ctx, pool, 7, 20); err != nil {
		log.Fatal(err)
	}
}
